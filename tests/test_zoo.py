"Every model of the zoo as a user starts it, up to the first step: the doctor must have no reason to stop it."
import numpy as np
import pandas as pd
import pytest

from mbnb import datasets
from mbnb.experiment import configure, look_before
from mbnb.zoo import MODELS

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
