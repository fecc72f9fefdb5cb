"""Protocols on the real data sets: the fixed list of retail_beh, negatives for every user of Beauty."""

import time

import numpy as np
import pytest
import torch

from mbnb.datasets import load
from mbnb.evaluators.metrics import per_case, table
from mbnb.evaluators.protocols import (
    by_slice,
    candidate_ids,
    chance_row,
    filtered_targets,
    fixed_negatives,
    make_plan,
    slices,
    without_done,
)
from mbnb.evaluators.ranks import EvalError, rank_cases

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def retail(shared_data):
    return load("retail_beh"), shared_data / "retail_beh" / "candidates101.txt"


def copy_recency(n_rows):
    "Last position of an item in the history, all others 0."

    def score(batch):
        place = torch.arange(1.0, batch.item_seq.shape[1] + 1).expand(batch.item_seq.shape)
        return torch.zeros(len(batch), n_rows).scatter_reduce_(1, batch.item_seq, place, "amax")

    return score


def rank(s, plans):
    return rank_cases(copy_recency(len(s.items)), s, s.test, plans, batch_size=256, max_len=199, name="copy_recency")


def test_retail_fixed100(retail):
    "Recency copy under the fixed list, ties by expectation: .9933; over the whole catalogue: .9202."
    s, file = retail
    plans = [make_plan(s, s.test, p, seen_filter="none", split="test", candidate_file=file) for p in ("full", "fixed100")]
    found = rank(s, plans)
    row = table(found[""]) | table(found["fixed100"], suffix="fixed100")
    for name, value in {
        "NDCG@10": 0.9202,
        "HR@1": 0.8370,
        "HR@10": 0.9860,
        "NDCG@10[fixed100]": 0.9933,
        "HR@1[fixed100]": 0.9931,
        "HR@5[fixed100]": 0.9933,
        "HR@10[fixed100]": 0.9937,
        "MRR@10[fixed100]": 0.9932,
    }.items():
        assert row[name] == pytest.approx(value, abs=6e-5), name
    assert chance_row(plans[1])["NDCG@10[fixed100]"] == pytest.approx(0.0450, abs=5e-5)


def test_retail_candidates(retail):
    "7.35 % of the truths are listed; none is left among a case's negatives, nor is any item of its history."
    s, file = retail
    ids = candidate_ids(s, file, 100)
    assert np.isin(s.test.target, ids).mean() == pytest.approx(0.0735)
    drawn = fixed_negatives(s, s.test, ids, split="test")
    assert not (drawn == s.test.target[:, None]).any()
    for c in range(len(s.test)):
        assert not np.isin(drawn[c], s.item[s.test.start[c] : s.test.stop[c]]).any() and len(np.unique(drawn[c])) == 100


def test_retail_seen_filter_removes_the_targets(retail):
    s, _ = retail
    count, share = filtered_targets(s, s.test, "all_seen")
    assert count == 1986 and share == pytest.approx(0.993)
    with pytest.raises(EvalError, match=r"1,986 of 2,000 test cases \(99\.3 %"):
        make_plan(s, s.test, "full", seen_filter="all_seen", split="test")


def test_retail_slices(retail):
    s, _ = retail
    found = rank(s, [make_plan(s, s.test, "full", seen_filter="none", split="test")])[""]
    parts = by_slice(found, slices(s, s.test))
    assert parts["repeat"]["n"] == 1986 and parts["novel"] == {"n": 14, "metrics": "not measurable"}
    done = [b for b, name in enumerate(s.behaviors) if name in ("buy", "unknown")]
    assert without_done(s, s.test, done).all()
    assert (len(s.valid), int((~slices(s, s.valid)["repeat"]).sum()), int(without_done(s, s.valid, done).sum())) == (3130, 289, 2287)


def test_beauty(shared_data):
    "No repeats, so the filter removes no target; 99 negatives for 22,363 users, none of them touched, in seconds."
    s = load("beauty")
    full = make_plan(s, s.test, "full", seen_filter="all_seen", split="test")
    assert full.missed is None and (full.m == s.n_items - np.diff(full.seen[0])).all()
    start = time.perf_counter()
    plan = make_plan(s, s.test, "uni99", seen_filter="all_seen", split="test")
    assert time.perf_counter() - start < 15
    assert plan.candidates.shape == (22_363, 99) and (np.diff(np.sort(plan.candidates, 1), axis=1) > 0).all()
    V = len(s.items)
    touched = np.repeat(np.arange(len(s.users)), np.diff(s.offsets)) * V + s.item
    assert not np.isin(s.test.user[:, None] * V + plan.candidates, touched).any()
    pop = torch.from_numpy(
        np.bincount(np.concatenate([s.item[a:b] for a, b in zip(s.train.start, s.train.stop)] + [s.train.target]), minlength=V)
    ).float()
    ranks = rank_cases(
        lambda b: pop.expand(len(b), V),
        s,
        s.test,
        [full, make_plan(s, s.test, "full/none", seen_filter="all_seen", split="test")],
        batch_size=512,
        max_len=50,
    )
    assert per_case(ranks[""], "HR", 10).mean() == pytest.approx(0.0115, abs=1e-4)
    assert per_case(ranks["full/none"], "HR", 10).mean() == pytest.approx(0.0113, abs=1e-4)
