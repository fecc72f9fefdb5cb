"""GEAR on its data sets: what stands in the input, what is asked for in training, and what the published rule would ask."""

import time

import numpy as np
import pytest
import torch

from mbnb.datasets import load
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import rank_cases
from mbnb.fit import FitConfig, Stage, fit
from mbnb.losses.ce import CE
from mbnb.models.gear import GEAR, as_steps
from mbnb.sequences import batches, collate

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def taobao(shared_data):
    return load("taobao-category")


@pytest.fixture(scope="module")
def kuairand(shared_data):
    return load("kuairand")


def own_video_share(s, stop):
    "Share of test cases whose target stands among the events `[start, stop)`."
    return np.mean([t in s.item[a:b] for a, b, t in zip(s.test.start, stop, s.test.target, strict=True)])


def test_strictly_earlier_input(kuairand):
    "By row order the video of a user's last like stands in its own input for three users of four; without its impression, for .9 %."
    s, c = kuairand, kuairand.test
    by_row = [
        a + np.flatnonzero((s.item[a:e] == t) & (s.behavior[a:e] == b) & (s.time[a:e] == w))[-1]
        for a, e, t, b, w in zip(s.offsets[c.user], s.offsets[c.user + 1], c.target, c.target_behavior, c.target_time, strict=True)
    ]
    assert own_video_share(s, by_row) == pytest.approx(0.756, abs=5e-4)  # .758 where tied impressions are not kept together
    assert own_video_share(s, c.stop) == pytest.approx(0.009, abs=5e-4)
    for a, b, t, w in zip(c.start, c.stop, c.target, c.target_time, strict=True):
        assert not ((s.item[a:b] == t) & (s.time[a:b] == w)).any()


def test_no_item_label_inside_group(kuairand):
    "An item is asked for on the first row of its impression only."
    s = kuairand
    for batch in batches(s, s.train, 64, 49):
        steps = as_steps(batch)
        same = (steps.item[:, 1:] == steps.item[:, :-1]) & (steps.time[:, 1:] == steps.time[:, :-1]) & (batch.item_seq != 0)
        assert not (same & (steps.label[:, 1:] != 0)).any()
        assert 0 < (steps.label != 0).sum() < (steps.item != 0).sum()


def test_units(taobao, kuairand):
    for s, ticks in ((taobao, 1.0), (kuairand, 1000.0)):
        model = GEAR(GEAR.Config.small(s.n_items, s.n_behaviors))
        model.prepare(s)
        assert float(model.per_second) == ticks and bool(model.given)
        span = as_steps(collate(s, s.test, np.arange(9), 49)).time
        assert 0 < (span[:, -1] - span[:, 0]).max() / ticks < 400 * 86_400, "the window spans days, not milliseconds or centuries"


def test_published_split_counts(taobao):
    "A user whose last event is a buy is a case of the published split; the others only train."
    s = taobao
    last = s.behavior[s.offsets[1:] - 1] == s.behaviors.index("buy")
    print(f"taobao: published {int(last.sum())} of {len(s.users)} users give a case, no test set; ours {len(s.valid)}, {len(s.test)}")
    assert 0 < last.sum() < len(s.test) == 538
    assert len(s.valid) == 347


@pytest.mark.slow
def test_small_epoch_and_a_first_result(taobao):
    "An epoch of the small preset under 5 s of CPU; after a few it is above popularity."
    s = taobao
    torch.manual_seed(0)
    model = GEAR(GEAR.Config.small(s.n_items, s.n_behaviors))
    model.prepare(s)
    plan = make_plan(s, s.test, "full", seen_filter="none", split="test")

    def evaluate(m):
        ranks = rank_cases(m.score, s, s.test, [plan], batch_size=256, max_len=49)[plan.name]
        value = float(per_case(ranks, "NDCG", 10).mean())
        return {"value": value, "error": 0.0, "metrics": {}}

    start, found = time.process_time(), []
    stage = Stage(**GEAR.STAGE | {"epochs": 12, "patience": 0, "lr": 5e-3})
    for record in fit(model, {None: CE()}, s, [stage], FitConfig(batch_size=32), evaluate):
        if record["kind"] == "epoch":
            found.append(record["value"])
    assert (time.process_time() - start) / 12 < 5
    assert found[-1] > 0.064 > found[0], "pop_behavior has .064"
