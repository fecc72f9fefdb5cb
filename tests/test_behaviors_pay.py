"""A model that reads behaviors beats its blind twin where behaviors matter, and not where they do not: after a buy, on the toy shop.

GEAR has the same test on its page. Validation and test cases are taken together: the model has been chosen on neither."""

from itertools import count

import numpy as np
import pytest

from mbnb import datasets
from mbnb.evaluators import metrics, protocols, ranks, stats
from mbnb.fit import FitConfig, FitState, Stage, fit, seed_everything
from mbnb.losses.ce import CE
from mbnb.models.mbht import MBHT
from mbnb.models.mbr_mamba import MBRMamba
from mbnb.models.mgpt import MGPT
from mbnb.models.pbat import PBAT
from mbnb.sequences import behavior_blind

CLOZE = [
    pytest.param(MBHT, {"dropout": 0.1}, {"lr": 1e-2, "epochs": 20}, id="mbht"),
    pytest.param(MGPT, {"dropout": 0.1}, {"lr": 5e-3, "epochs": 20, "loss_weights": {"main": 2.0, "edges": 6.4e-4}}, id="mgpt"),
    pytest.param(MBRMamba, {"dropout": 0.1}, {"lr": 3e-3, "epochs": 20}, id="mbr_mamba"),
    pytest.param(PBAT, {"dropout": 0.1, "d_model": 32, "prefix_prob": 0.5}, {"lr": 1e-2, "epochs": 20, "schedule": "linear"}, id="pbat"),
]


def trained(cls, sequences, changes, stage):
    "A small model of the class, trained through one stage."
    rng, clock = seed_everything(0), count()                   # the last epoch counts as the best
    users = {"n_users": len(sequences.users)} if "n_users" in cls.Config.__dataclass_fields__ else {}
    model = cls(cls.Config.small(sequences.n_items, sequences.n_behaviors, **users, **changes))
    unseen = lambda model: {"value": float(next(clock)), "error": 0., "metrics": {}}
    for _ in fit(model, {None: CE()}, sequences, [Stage(patience=0, **stage)], FitConfig(), unseen, FitState(rng)): pass
    return model


def after_a_buy(model, sequences, shop):
    "NDCG@10 of the validation and test cases that come after a buy; `shop` has the true behaviors."
    values = []
    for split in ("valid", "test"):
        cases = sequences.cases(split)
        plan = protocols.make_plan(sequences, cases, "full", seen_filter="none", split=split)
        found = ranks.rank_cases(model.score, sequences, cases, [plan], batch_size=256, max_len=model.config.max_len)
        values.append(metrics.per_case(found[plan.name], "NDCG", 10)[protocols.slices(shop, shop.cases(split))["after_buy"]])
    return np.concatenate(values)


def edge(cls, changes, stage, effect):
    "With behaviors minus without: (mean difference, p of the paired test)."
    shop = datasets.load("toyshop", behavior_effect=effect)
    found = [after_a_buy(trained(cls, s, changes, stage), s, shop) for s in (shop, behavior_blind(shop))]
    return float(found[0].mean() - found[1].mean()), stats.permutation_test(*found)


@pytest.mark.slow
@pytest.mark.parametrize("cls, changes, stage", CLOZE)
def test_behaviors_pay_after_a_buy_and_only_if_they_matter(cls, changes, stage):
    (gain, p), (none, p_none) = edge(cls, changes, stage, 1.0), edge(cls, changes, stage, 0.0)
    print(f"after a buy, with behaviors minus without: {gain:+.4f} (p {p:.4f}); behavior_effect=0: {none:+.4f} (p {p_none:.4f})")
    assert gain > 0 and p < 0.05, (gain, p)
    assert none <= 0 or p_none >= 0.05, (none, p_none)         # no advantage is left; the twin may be ahead
    assert gain > 2 * abs(none)
