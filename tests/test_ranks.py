"""Ranking whole lists of cases: several plans at once, the same again, in another process, in little memory."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from mbnb.evaluators import ranks as module
from mbnb.evaluators.ranks import EvalError, Plan, in_history, rank_cases
from mbnb.sequences import Cases, Sequences


def shop(n=300, n_items=50, seed=0):
    "n users with 1..12 events; the last of each is asked for."
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 13, n)
    offsets = np.append(0, np.cumsum(length))
    item = rng.integers(1, n_items + 1, offsets[-1], dtype=np.int32)
    last = offsets[1:] - 1
    cases = Cases(np.arange(n), offsets[:-1], last, item[last], np.ones(n, np.int32), last)
    tokens = np.append("", np.arange(n_items)).astype(object)
    return Sequences("shop", np.arange(n), tokens, ("", "view"), offsets, item, np.ones_like(item), np.arange(offsets[-1]),
                     np.ones(offsets[-1], bool), cases, cases, cases)


def plans(s, seed=0):
    "full/none, a filter of everything seen but the target, 9 negatives, and 9 negatives under the filter."
    rng, c = np.random.default_rng(seed), s.test
    seen = [np.setdiff1d(s.item[a:b], [t]) for a, b, t in zip(c.start, c.stop, c.target)]
    csr = np.append(0, np.cumsum([len(x) for x in seen])), np.concatenate(seen).astype(np.int32)
    negatives = np.stack([rng.choice(np.setdiff1d(np.arange(1, s.n_items + 1), [t]), 9, replace=False) for t in c.target]).astype(np.int32)
    both = np.array([10 - np.isin(n, x).sum() for n, x in zip(negatives, seen)])
    full = np.full(len(c), s.n_items)
    return [Plan("", "full/none", None, None, full), Plan("full/x", "full/x", csr, None, full - np.diff(csr[0])),
            Plan("uni9", "uni9", None, negatives, np.full(len(c), 10)), Plan("both", "both", csr, negatives, both)]


def scorer(s, levels=7, seed=0):
    "A model with many ties: small whole numbers from the user and the item."
    table = torch.randint(0, levels, (len(s.users), len(s.items)), generator=torch.Generator().manual_seed(seed)).float()
    return table, lambda batch: table[batch.user]


def slow(table, s, plan):
    "(g, e) by sets and loops."
    out = []
    for n, t in enumerate(s.test.target):
        rivals = set(range(1, len(s.items))) if plan.candidates is None else set(plan.candidates[n].tolist())
        if plan.seen is not None: rivals -= set(plan.seen[1][plan.seen[0][n]:plan.seen[0][n + 1]].tolist())
        row = table[n].tolist()
        rivals.discard(int(t))
        assert len(rivals) + 1 == plan.m[n]
        out.append((sum(row[i] > row[t] for i in rivals), sum(row[i] == row[t] for i in rivals)))
    return np.array(out).T


@pytest.mark.parametrize("batch_size, block", [(7, 1), (64, 5), (1000, 1000)])
def test_all_plans_equal_the_slow_version(monkeypatch, batch_size, block):
    monkeypatch.setattr(module, "_block_rows", lambda scores: block)
    s = shop()
    table, score = scorer(s)
    before = table.clone()
    made = plans(s)
    found = rank_cases(score, s, s.test, made, batch_size=batch_size, max_len=5)
    for p in made:
        r, (g, e) = found[p.name], slow(table, s, p)
        assert (r.g == g).all() and (r.e == e).all() and (r.m == p.m).all()
        assert (r.case == np.arange(len(s.test))).all() and (r.target == s.test.target).all()
        assert [x.dtype for x in (r.case, r.user, r.target, r.g, r.e, r.m, r.repeat)] == [np.int64, np.int64, *[np.int32] * 4, bool]
    assert torch.equal(table, before)
    c = s.test
    assert found[""].repeat.tolist() == [t in s.item[a:b] for a, b, t in zip(c.start, c.stop, c.target)]


def test_no_plan_leaks_into_another():
    "Alone, together and in any order: the same counts."
    s = shop()
    _, score = scorer(s)
    made = plans(s)
    alone = {p.name: rank_cases(score, s, s.test, [p], batch_size=64, max_len=9)[p.name] for p in made}
    for order in (made, made[::-1], made[2:] + made[:2]):
        together = rank_cases(score, s, s.test, order, batch_size=64, max_len=9)
        for p in made: assert (together[p.name].g == alone[p.name].g).all() and (together[p.name].e == alone[p.name].e).all()


PROCESS = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
from test_ranks import shop, plans, rank_cases
torch.set_num_threads(1)
s = shop()
torch.manual_seed(3)
user, item = torch.randn(len(s.users), 16), torch.randn(len(s.items), 16)
found = rank_cases(lambda b: user[b.user] @ item.T, s, s.test, plans(s), batch_size=50, max_len=9)
print(hashlib.sha256(b"".join(r.g.tobytes() + r.e.tobytes() for r in found.values())).hexdigest())
"""


def test_same_weights_twice_and_in_another_process(request):
    "Identical g and e, twice here and once elsewhere."
    code = PROCESS.format(folder=str(request.path.parent))
    threads = torch.get_num_threads()
    here = []
    try:
        for _ in range(2):
            shown = []
            exec(compile(code, "here", "exec"), {"print": shown.append})
            here.append(shown[0])
    finally: torch.set_num_threads(threads)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert there.returncode == 0, there.stderr
    assert here[0] == here[1] == there.stdout.strip()


def test_history_is_the_whole_one():
    "A repeat from long ago counts, whatever the block size and max_len."
    s = shop(n=500, seed=4)
    c = s.test
    expected = [t in s.item[a:b] for a, b, t in zip(c.start, c.stop, c.target)]
    assert any(expected) and not all(expected)
    for events in (1, 3, 50, 1 << 22): assert in_history(s, c, events).tolist() == expected


def test_cases_that_miss_by_rule():
    "They stand behind every candidate and change no other case."
    s = shop()
    _, score = scorer(s)
    plain = plans(s)[1]
    missed = np.arange(len(s.test)) % 3 == 0
    cold = Plan(**{**plain.__dict__, "missed": missed})
    a, b = (rank_cases(score, s, s.test, [p], batch_size=64, max_len=9)["full/x"] for p in (plain, cold))
    assert (b.missed == missed).all() and (b.g[missed] == b.m[missed]).all() and (b.e[missed] == 0).all()
    assert (a.g[~missed] == b.g[~missed]).all() and (a.e[~missed] == b.e[~missed]).all()


def test_plans_that_do_not_fit_are_refused():
    s = shop()
    _, score = scorer(s)
    full, x, uni, _ = plans(s)
    ask = lambda *p: rank_cases(score, s, s.test, p, batch_size=64, max_len=9, name="sasrec")
    with pytest.raises(EvalError, match="share a name"): ask(full, full)
    with pytest.raises(EvalError, match="299 cases, expected 300"): ask(Plan("u", "uni9", None, uni.candidates[1:], uni.m))
    with pytest.raises(EvalError, match=r"ids .*\.\.51, expected 0\.\.50"): ask(Plan("u", "uni9", None, uni.candidates + 1, uni.m))
    with pytest.raises(EvalError, match="more than the 3 candidates"): ask(Plan("u", "uni9", None, uni.candidates, np.full(300, 3)))


def test_no_matrix_of_cases_by_items():
    "12,000 cases x 3,000 items would be 144 MB; what ranking itself allocates stays under 64 MB at any moment."
    n, V = 12_000, 3_001
    s = shop(n=n, n_items=V - 1)
    scores = torch.randn(256, V, generator=torch.Generator().manual_seed(0))
    full = Plan("", "full", None, None, np.full(n, V - 1))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        rank_cases(lambda batch: scores[:len(batch)], s, s.test, [full], batch_size=256, max_len=9)
    live = peak = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 64 << 20
