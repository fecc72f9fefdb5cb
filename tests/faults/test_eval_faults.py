"""Faults that meet the evaluation: F22 NaN scores, F23 constant scores, F24 a row that is all padding."""
import warnings

import numpy as np
import pytest
import torch

from mbnb.evaluators.metrics import per_case, table
from mbnb.evaluators.ranks import EvalError, Plan, rank_cases
from mbnb.events import MbnbError
from mbnb.sequences import Cases, Sequences

N, V = 12, 41          # cases; table rows, pad included


def shop(length=3):
    "N users with `length` events each (0: no history at all), asked for items 1..N."
    stop = np.arange(1, N + 1) * length
    cases = Cases(np.arange(N), stop - length, stop, np.arange(1, N + 1, dtype=np.int32), np.ones(N, np.int32), stop)
    item = np.arange(N * 3, dtype=np.int32) % (V - 1) + 1
    return Sequences("shop", np.arange(N), np.append("", np.arange(V - 1)).astype(object), ("", "view"), np.arange(N + 1) * 3, item,
                     np.ones_like(item), np.arange(len(item)), np.ones(len(item), bool), cases, cases, cases)


def full(seen=None): return Plan("", "full", seen, None, np.full(N, V - 1 - (0 if seen is None else 1)))
def uni():
    negatives = np.stack([np.setdiff1d(np.arange(1, V), [t])[:20] for t in range(1, N + 1)]).astype(np.int32)
    return Plan("uni20", "uni20", None, negatives, np.full(N, 21))
def removes(item): return np.arange(N + 1), np.full(N, item, np.int32)
def ask(score, *plans, s=None, **more):
    s = s or shop()
    return rank_cases(score, s, s.test, plans, batch_size=5, max_len=8, name="gru4rec", **more)


def honest(batch): return torch.arange(float(V)).expand(len(batch), V).clone()
def one_wrong(value, case, column):
    def score(batch):
        x = honest(batch)
        x[(batch.case == case).nonzero()[:, 0], column] = value
        return x
    return score


# F22

@pytest.mark.parametrize("value, words", [(torch.nan, "1 NaN"), (torch.inf, "1 \\+inf")])
@pytest.mark.parametrize("column", [8, 15, V - 1])
def test_f22_one_wrong_number_stops_the_evaluation(value, words, column):
    "In the target's place (case 7 is asked for item 8) or in any candidate's: model, case and count are named."
    with pytest.raises(EvalError, match=rf"gru4rec: case 7 .*{words}") as stopped: ask(one_wrong(value, 7, column), full())
    assert isinstance(stopped.value, MbnbError)


def test_f22_all_nan():
    with pytest.raises(EvalError, match="40 NaN"): ask(lambda b: honest(b) * torch.nan, full())


def test_f22_among_sampled_negatives():
    with pytest.raises(EvalError, match="case 7 has 1 NaN"): ask(one_wrong(torch.nan, 7, 12), uni())
    with pytest.raises(EvalError, match="case 7"): ask(one_wrong(torch.nan, 7, 8), uni())


def test_f22_what_is_no_candidate_is_not_looked_at():
    "NaN in the pad column, or where the seen filter stands anyway, touches nobody."
    clean = ask(honest, full(removes(30)))[""]
    for column in (0, 30):
        found = ask(one_wrong(torch.nan, 7, column), full(removes(30)))[""]
        assert (found.g == clean.g).all() and (found.e == clean.e).all()


def test_f22_target_at_minus_infinity_is_never_a_silent_miss():
    with pytest.raises(EvalError, match="case 7 stands at -inf"): ask(one_wrong(-torch.inf, 7, 8), full())
    with pytest.raises(EvalError, match="seen filter of protocol 'full' removes the target of 1 of 12"): ask(honest, full(removes(8)))


# F23

@pytest.mark.parametrize("value", [0., -3.25, 1e30])
def test_f23_constant_scores_are_worth_exactly_chance(value):
    found = ask(lambda b: torch.full((len(b), V), value), full(), Plan("full/x", "full/x", removes(30), None, np.full(N, V - 2)), uni())
    for r in found.values():
        assert (r.g == 0).all() and (r.e == r.m - 1).all()
        for k in (1, 5, 10, 20): assert (per_case(r, "HR", k) == k / r.m).all()
    assert table(found[""])["HR@10"] == 10 / (V - 1)


# F24

def attention_like(batch):
    "NaN for a row of padding alone, as attention without any key gives."
    return torch.where((batch.item_seq != 0).any(1, keepdim=True), honest(batch), torch.nan)


def test_f24_attention_over_padding_is_nan():
    "The fault is real: torch's own module."
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    out, _ = layer(x, x, x, key_padding_mask=torch.tensor([[False] * 3, [True] * 3]))
    assert torch.isfinite(out[0]).all() and torch.isnan(out[1]).all()


def test_f24_a_case_without_history_is_counted_and_never_nan():
    "It stays in the denominator; a NaN answer is worth chance, and is said aloud with its count."
    s = shop()
    empty = np.isin(np.arange(N), (2, 9))
    c = s.test
    cases = Cases(c.user, np.where(empty, c.stop, c.start), c.stop, c.target, c.target_behavior, c.target_time)
    with pytest.warns(UserWarning, match="gru4rec: 2 of 12 cases have no history"):
        found = rank_cases(attention_like, s, cases, [full(), uni()], batch_size=5, max_len=8, name="gru4rec")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = rank_cases(honest, s, cases, [full(), uni()], batch_size=5, max_len=8)
    for name, r in found.items():
        assert len(r) == N and (r.g[empty] == 0).all() and (r.e[empty] == r.m[empty] - 1).all()
        assert (r.g[~empty] == clean[name].g[~empty]).all() and (r.e[~empty] == clean[name].e[~empty]).all()
        assert all(np.isfinite(v) for v in table(r).values())
    assert not clean[""].repeat[empty].any()


def test_f24_all_cases_without_history():
    with pytest.warns(UserWarning, match="12 of 12"): found = ask(attention_like, full(), s=shop(length=0))[""]
    assert table(found)["HR@10"] == 10 / (V - 1)


def test_f24_nan_with_a_history_stays_an_error():
    with pytest.raises(EvalError, match="case 0 has 40 NaN"):
        ask(lambda b: attention_like(b) * torch.where(b.case == 0, torch.nan, 1.)[:, None], full())
