"Every model of the zoo as a user starts it, up to the first step: the doctor must have no reason to stop it."
from dataclasses import asdict, fields

import numpy as np
import pandas as pd
import pytest

from mbnb import datasets
from mbnb.checks import build
from mbnb.config import SIZES
from mbnb.events import MbnbError
from mbnb.experiment import configure, look_before
from mbnb.zoo import MODELS, model_class

SEARCH = "data.users=20"            # models that write their answer: ids and searches for a few users do
HEADS = [(m, "model.head=repeat") for m in ("sasrec", "mgpt", "gear", "mbht")]
ABLATED = [("pbat", "model.sigma=one"), ("pbat", "model.users=shared"), ("pbat", "model.ffn=shared"), ("mbht", "model.hypergraph=False"),
           ("mule", "model.graphs=()"), ("sigma_mule", "model.graph_weight=0.")]
PLAIN = [(m, SEARCH if m in ("tiger", "gram") else "") for m in MODELS if m != "gram_c"]         # gram_c wants a run of lightgcn
TEXTS = ("ur4rec", "tiger", "gram")  # read texts, which a bare file has none of


@pytest.mark.parametrize("target", ["", "data.target=buy"], ids=["any", "buy"])
@pytest.mark.parametrize("model, setting", PLAIN + HEADS)
def test_nothing_stops_a_model_before_its_first_step(model, setting, target):
    "Whether the data set asks for certain behaviors or for whatever comes next."
    if setting == SEARCH and target: pytest.skip("asked once: neither reads the behavior")
    cards = look_before(configure(model=model, dataset="toyshop-tiny", set=f"fit.threads=1 {setting} {target}"))
    assert not [str(c) for c in cards if c.severity == "E"]


@pytest.mark.parametrize("model, setting", ABLATED)
def test_nothing_stops_a_model_without_a_part(model, setting):
    cards = look_before(configure(model=model, dataset="toyshop-tiny", set=f"fit.threads=1 {setting}"))
    assert not [str(c) for c in cards if c.severity == "E"]


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    "A file of one behavior: the views of the tiny shop."
    shop, file = datasets.load("toyshop-tiny"), tmp_path_factory.mktemp("views") / "views.csv"
    of = np.repeat(np.arange(len(shop.users)), np.diff(shop.offsets))
    rows = pd.DataFrame({"user": shop.users[of], "item": shop.items[shop.item], "behavior": "view", "time": shop.time})[shop.behavior == 1]
    rows.to_csv(file, index=False)
    return file


@pytest.mark.parametrize("model, setting", [p for p in PLAIN if p[0] not in TEXTS])
def test_nothing_stops_a_model_where_there_is_one_behavior(model, setting, views):
    cards = look_before(configure(model=model, dataset=str(views), set=f"fit.threads=1 {setting}"))
    assert not [str(c) for c in cards if c.severity == "E"]


@pytest.mark.parametrize("model", MODELS)
def test_a_setting_that_makes_no_sense_is_refused_by_name(model):
    "A whole number below zero, a share above one, a word that nobody knows: a ValueError, which a run makes a sentence of."
    cls = model_class(model)
    for name, value in asdict(build(cls).config).items():
        share, word = name.endswith(("dropout", "_prob")), value and isinstance(value, str)
        wrong = -1 if type(value) is int else 1.5 if share else "nonsense" if word else None
        if wrong is None or name in SIZES: continue
        with pytest.raises(ValueError, match=f"{name}={wrong!r}"): build(cls, **{name: wrong})


@pytest.mark.parametrize("name", ["max_len", "d_model", "n_layers", "n_heads", "d_conv", "d_state", "beam", "chunk"])
def test_a_size_of_zero_is_refused(name):
    with_it = [m for m in MODELS if name in {f.name for f in fields(model_class(m).Config)} and (m, name) != ("lightgcn", "n_layers")]
    assert len(with_it) > 1
    for model in with_it:
        with pytest.raises(ValueError, match=f"{name}=0: expected 1 or more"): build(model_class(model), **{name: 0})


MEANINGLESS = [("mgpt", {"n_heads": 3}, "d_model=32 is not a multiple of n_heads=3"),
               ("mgpt", {"scales": (), "n_queries": ()}, r"scales=\(\)"),
               ("mmq", {"hidden": (64,)}, "expected two widths"), ("mmq", {"modalities": ("id", "id")}, "each once"),
               ("mbht", {"mask_window": (5, 0)}, "mask_window"), ("ur4rec", {"memory_drift": -1.}, "expected 0 to 2"),
               ("sigma_mule", {"graph_weight": float("inf")}, "graph_weight=inf")]


@pytest.mark.parametrize("model, changes, says", MEANINGLESS)
def test_settings_that_do_not_fit_together(model, changes, says):
    with pytest.raises(ValueError, match=says): build(model_class(model), **changes)


WRONG = [("model.scales=[4.5,10]", "expected whole numbers"),
         ("fit.loss_weights={'main':-1.}", "loss_weights="), ("fit.min_delta=-.5", "min_delta=-0.5"),
         ("fit.precision=bf17", "expected '32', 'bf16' or '16'"), ("fit.lr=-1.", "lr=-1.0"),
         ("eval.select_on=tets", "expected 'valid' or 'test'"),
         ("eval.seen_filter=seen", "seen_filter='seen'"), ("fit.unseen=drwan", "expected 'trained' or 'drawn'")]


@pytest.mark.parametrize("setting, says", WRONG)
def test_a_wrong_setting_is_refused_before_the_data_is_read(setting, says):
    with pytest.raises(MbnbError, match=says): configure(model="mgpt", dataset="toyshop-tiny", set=setting)
