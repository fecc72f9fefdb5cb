"""Protocols: random shops against slow and obvious versions, the same in every process, and what must be refused."""

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from mbnb.evaluators.metrics import per_case, table
from mbnb.evaluators.protocols import (
    FILTERS,
    by_slice,
    chance_row,
    check_same,
    decode,
    differing,
    draw_negatives,
    estimated_rank,
    filtered_targets,
    fingerprint,
    fixed_negatives,
    least_first,
    least_share,
    length_slices,
    load_negatives,
    make_plan,
    parse,
    popularity_slices,
    read_protocol,
    repeat_mask,
    save_negatives,
    seen_items,
    slices,
    without_done,
)
from mbnb.evaluators.ranks import EvalError, rank_cases, removed
from mbnb.sequences import Cases, Sequences, train_counts


def shop(n=200, n_items=60, seed=0, longest=15, target_behaviors=(2,)):
    "n users with 3..longest events of two behaviors; the last is the test, the one before the validation case."
    rng = np.random.default_rng(seed)
    length = rng.integers(3, longest + 1, n)
    offsets = np.append(0, np.cumsum(length))
    item = (1 + n_items * rng.random(offsets[-1]) ** 2).astype(np.int32)
    behavior = rng.integers(1, 3, offsets[-1], dtype=np.int32)

    def ask(at):
        return Cases(np.arange(n), offsets[:-1], at, item[at], behavior[at], at)

    tokens = np.append("", [f"i{k}" for k in range(1, n_items + 1)]).astype(object)
    return Sequences(
        "shop",
        np.arange(n),
        tokens,
        ("", "view", "buy"),
        offsets,
        item,
        behavior,
        np.arange(offsets[-1]),
        np.ones(offsets[-1], bool),
        ask(offsets[1:] - 3),
        ask(offsets[1:] - 2),
        ask(offsets[1:] - 1),
        target_behaviors=target_behaviors,
        split={"kind": "leave_one_out"},
        data_hash="d" * 64,
        split_hash="s" * 64,
    )


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_plan(*args, **kwargs)


# ---- names ----


@pytest.mark.parametrize(
    "text, names",
    [
        ("full", ["full"]),
        (" full ,uni99", ["full", "uni99"]),
        (
            "full, full/none, full/all_seen, full/target_behavior, uni1, pop100/none, fixed100",
            ["full", "full/none", "full/all_seen", "full/target_behavior", "uni1", "pop100/none", "fixed100"],
        ),
    ],
)
def test_parse(text, names):
    assert parse(text) == names


@pytest.mark.parametrize(
    "text, near",
    [
        ("Full", "full"),
        ("uniform99", "uni99"),
        ("uni-100", "uni100"),
        ("uni099", "uni99"),
        ("fixed", "fixed99"),
        ("pop_50", "pop50"),
        ("full/seen", "full/all_seen"),
        ("uni99/target", "uni99/target_behavior"),
        ("full5", "full"),
        ("uni99 full", "uni99/all_seen"),
    ],
)
def test_parse_names_the_nearest(text, near):
    with pytest.raises(EvalError, match="is unknown; did you mean") as e:
        parse(text)
    assert f"mean {near!r}" in str(e.value) or text == "uni99 full"
    assert "fixed<m>" in str(e.value) and repr(text) in str(e.value)


@pytest.mark.parametrize("text", ["", ",", "full,,uni99", "full,full"])
def test_parse_refuses(text):
    with pytest.raises(EvalError):
        parse(text)


# ---- the seen filter ----


@pytest.mark.parametrize("rule", FILTERS)
@pytest.mark.parametrize("targets", [(2,), ()])
def test_seen_equals_slow(rule, targets, monkeypatch):
    import mbnb.evaluators.protocols as module

    s = shop(target_behaviors=targets)
    blocks = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda length, events=100: blocks(length, 100))  # many blocks
    found = seen_items(s, s.test, rule)
    if rule == "none":
        assert found is None
        return
    offsets, items = found
    assert offsets.dtype == np.int64 and items.dtype == np.int32
    for c, (a, b) in enumerate(zip(s.test.start, s.test.stop)):
        wanted = {i for i, x in zip(s.item[a:b], s.behavior[a:b]) if rule == "all_seen" or not targets or x in targets}
        assert items[offsets[c] : offsets[c + 1]].tolist() == sorted(wanted)


def test_filter_that_removes_targets():
    s = shop()
    count, share = filtered_targets(s, s.test, "all_seen")
    assert count == repeat_mask(s, s.test).sum() > 0 and share == count / len(s.test)
    with pytest.raises(EvalError, match=rf"target of {count} of 200 test cases \({100 * share:.1f} %"):
        make_plan(s, s.test, "full", seen_filter="all_seen", split="test")
    plan = make_plan(s, s.test, "full", seen_filter="all_seen", split="test", filtered_target="miss")
    assert (plan.missed == removed(plan.seen, s.test.target)).all() and plan.missed.sum() == count
    ranks = rank_cases(lambda b: torch.zeros(len(b), 61), s, s.test, [plan], batch_size=64, max_len=20)[""]
    assert (ranks.g[plan.missed] == ranks.m[plan.missed]).all() and not ranks.e[plan.missed].any()
    assert (per_case(ranks, "HR", 10)[plan.missed] == 0).all()
    assert table(ranks)["NDCG@10"] == pytest.approx(chance_row(plan)["NDCG@10"], abs=1e-12)  # constant scores earn chance
    with pytest.raises(EvalError, match="filtered_target='drop'"):
        make_plan(s, s.test, "full", seen_filter="none", split="test", filtered_target="drop")


def test_filtered_targets_are_misses_under_negatives_too():
    s = shop()
    with pytest.raises(EvalError, match="would remove the target"):
        quiet(s, s.test, "uni9", seen_filter="all_seen", split="test")
    plan = quiet(s, s.test, "uni9", seen_filter="all_seen", split="test", filtered_target="miss")
    free = quiet(s, s.test, "uni9/none", seen_filter="all_seen", split="test")
    assert plan.missed.any() and free.missed is None and (plan.candidates == free.candidates).all()
    assert plan.fingerprint != free.fingerprint
    ranks = rank_cases(lambda b: torch.zeros(len(b), 61), s, s.test, [plan], batch_size=64, max_len=20)["uni9"]
    assert (ranks.missed == plan.missed).all()


# ---- negatives ----


@pytest.mark.parametrize("protocol", ["uni9", "uni40", "pop9", "pop25"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_negatives_are_none_of_the_users_items(protocol, split):
    s = shop()
    cases, m = s.cases(split), read_protocol(protocol).n
    drawn = draw_negatives(s, cases, protocol, split=split)
    assert drawn.shape == (len(cases), m) and drawn.dtype == np.int32
    assert all(len(set(row)) == m for row in drawn.tolist())
    assert drawn.min() >= 1 and drawn.max() <= s.n_items
    for u, row in zip(cases.user, drawn):
        assert not set(row.tolist()) & set(s.item[s.offsets[u] : s.offsets[u + 1]].tolist())
    if protocol.startswith("pop"):
        assert (train_counts(s)[drawn] > 0).all()


def test_negatives_leave_out_targets_that_are_no_events():
    "Ready-made lists: the target is not among the flat events."
    s = shop(n=2000, n_items=12, longest=3)
    other = replace(s, test=replace(s.test, target=(1 + s.test.target % 12).astype(np.int32)))
    drawn = draw_negatives(other, other.test, "uni8", split="test")
    assert not (drawn == other.test.target[:, None]).any()


def test_negatives_for_a_list_that_is_no_split():
    "Cases made elsewhere: their targets are left out as well."
    s = shop(n=500, n_items=20, longest=4)
    cases = replace(s.test, target=(1 + s.test.target % 20).astype(np.int32))
    assert not (draw_negatives(s, cases, "uni15", split="x") == cases.target[:, None]).any()


def test_all_that_is_left_can_be_drawn():
    "As many negatives as the fullest user leaves: the last draws go to the race, and nothing is missing."
    s = shop(n=50, n_items=30)
    left = min(30 - len(set(s.item[a:b].tolist())) for a, b in zip(s.offsets[:-1], s.offsets[1:]))
    drawn = draw_negatives(s, s.test, f"uni{left}", split="test")
    assert all(len(set(row)) == left for row in drawn.tolist())
    with pytest.raises(EvalError, match=f"needs {left + 1} negatives and only {left} items"):
        draw_negatives(s, s.test, f"uni{left + 1}", split="test")


def test_blocks_of_cases(monkeypatch):
    s = shop()
    drawn = draw_negatives(s, s.test, "uni20", split="test", block=7)
    for u, row in zip(s.test.user, drawn):
        assert len(set(row.tolist())) == 20 and not set(row.tolist()) & set(s.item[s.offsets[u] : s.offsets[u + 1]].tolist())


def test_users_with_several_cases_in_any_order():
    s = shop()
    rows = np.random.default_rng(0).integers(0, len(s.test), 300)
    cases = s.test.take(rows)
    drawn = draw_negatives(s, cases, "uni20", split="test")
    for u, row in zip(cases.user, drawn):
        assert not set(row.tolist()) & set(s.item[s.offsets[u] : s.offsets[u + 1]].tolist())
    assert len({tuple(sorted(r)) for r in drawn[cases.user == cases.user[0]].tolist()}) == (cases.user == cases.user[0]).sum()


def test_uniform_draws_are_uniform():
    s = shop(n=1, n_items=40, longest=3)
    cases = s.test.take(np.zeros(20_000, np.int64))
    count = np.bincount(draw_negatives(s, cases, "uni10", split="test").ravel(), minlength=41)
    free = np.setdiff1d(np.arange(1, 41), s.item)
    p = 10 / len(free)
    z = (count[free] - 20_000 * p) / np.sqrt(20_000 * p * (1 - p))
    assert count[s.item].sum() == 0 and np.abs(z).max() < 4


def test_fixed_list():
    s = shop(n_items=80)
    ids = np.arange(1, 31, dtype=np.int32)  # the popular end
    drawn = fixed_negatives(s, s.test, ids, split="test")
    for c, row in enumerate(drawn):
        history = set(s.item[s.test.start[c] : s.test.stop[c]].tolist()) | {int(s.test.target[c])}
        kept, new = set(row.tolist()) & set(ids.tolist()), set(row.tolist()) - set(ids.tolist())
        assert len(set(row.tolist())) == 30
        assert kept == set(ids.tolist()) - history  # what may stay stays
        assert not new & history and len(new) == len(set(ids.tolist()) & history)
    assert (drawn == fixed_negatives(s, s.test, ids, split="test")).all()
    assert (drawn != fixed_negatives(s, s.test, ids, split="test", seed=1)).any()


def test_fixed_needs_a_file(tmp_path):
    s = shop()
    file = tmp_path / "five.txt"
    file.write_text("i1 i2 i3\ni4 i5")
    plan = make_plan(s, s.test, "fixed5", seen_filter="none", split="test", candidate_file=file)
    assert plan.name == "fixed5" and (plan.m == 6).all()
    for name, candidates, told in [
        ("fixed5", None, "needs a candidate file"),
        ("fixed6", file, "call it fixed5"),
        ("fixed5", tmp_path / "no.txt", "no candidate file"),
        ("fixed2", ["i1", "i999"], "i999"),
        ("fixed2", ["i1", "i1"], "1 repeated"),
    ]:
        with pytest.raises(EvalError, match=told):
            quiet(s, s.test, name, seen_filter="none", split="test", candidate_file=candidates)


def test_negatives_file(tmp_path):
    s = shop()
    plan = quiet(s, s.test, "uni9", seen_filter="none", split="test", seed=3)
    save_negatives(plan, tmp_path / "n.npz")
    drawn, fields = load_negatives(tmp_path / "n.npz")
    assert (drawn == plan.candidates).all() and fields == plan.fields["negatives"] and fields["seed"] == 3
    with pytest.raises(EvalError, match="no negatives"):
        save_negatives(make_plan(s, s.test, "full", seen_filter="none", split="test"), tmp_path / "m.npz")


# ---- the same again ----

PROGRAM = """
import sys, warnings; sys.path.insert(0, {here!r}); warnings.simplefilter("ignore")
import torch; torch.set_num_threads({threads})
from test_protocols import quiet, shop
s = shop()
for name in ("full", "uni9", "pop9", "fixed30"):
    p = quiet(s, s.test, name, seen_filter="none", split="test", candidate_file=[f"i{{k}}" for k in range(1, 31)])
    print(name, p.fingerprint, (p.fields["negatives"] or {{}}).get("sha256"))
"""


def test_same_in_another_process():
    from pathlib import Path

    here = str(Path(__file__).parent)
    told = {
        subprocess.run([sys.executable, "-c", PROGRAM.format(here=here, threads=k)], capture_output=True, text=True, check=True).stdout
        for k in (1,)
    }
    s = shop()
    ours = [
        quiet(s, s.test, n, seen_filter="none", split="test", candidate_file=[f"i{k}" for k in range(1, 31)])
        for n in ("full", "uni9", "pop9", "fixed30")
    ]
    assert told == {"".join(f"{p.protocol} {p.fingerprint} {(p.fields['negatives'] or {}).get('sha256')}\n" for p in ours)}


def test_same_weights_twice_and_another_seed():
    "Evaluation.md, acceptance 4."
    s, weights = shop(), torch.randn(61, generator=torch.Generator().manual_seed(0))

    def score(batch):
        return weights.expand(len(batch), 61)

    def run(seed):
        plan = quiet(s, s.test, "uni9", seen_filter="none", split="test", seed=seed)
        return plan, rank_cases(score, s, s.test, [plan], batch_size=32, max_len=10)["uni9"]

    (p1, r1), (p2, r2), (p3, _) = run(0), run(0), run(1)
    assert (r1.g == r2.g).all() and (r1.e == r2.e).all() and p1.fingerprint == p2.fingerprint != p3.fingerprint


# ---- fingerprints ----


def test_fingerprint_depends_on_what_matters():
    s = shop()
    base = make_plan(s, s.test, "full", seen_filter="none", split="test")
    assert len(base.fingerprint) == 8 and base.fingerprint == fingerprint(base.fields)
    assert make_plan(s, s.test, "full/none", seen_filter="all_seen", split="test").fingerprint == base.fingerprint
    others = {
        "valid": make_plan(s, s.valid, "full", seen_filter="none", split="valid"),
        "filter": make_plan(s, s.test, "full", seen_filter="target_behavior", split="test", filtered_target="miss"),
        "uni": quiet(s, s.test, "uni9", seen_filter="none", split="test"),
        "fewer": make_plan(s, s.test.take(slice(0, 100)), "full", seen_filter="none", split="test"),
        "data": make_plan(replace(s, data_hash="e" * 64), s.test, "full", seen_filter="none", split="test"),
        "split": make_plan(replace(s, split_hash="e" * 64), s.test, "full", seen_filter="none", split="test"),
        "target": make_plan(replace(s, target_behaviors=(1,)), s.test, "full", seen_filter="none", split="test"),
    }
    marks = [base.fingerprint, *(p.fingerprint for p in others.values())]
    assert len(set(marks)) == len(marks)
    assert set(differing({"a": base.fields, "b": others["data"].fields})) == {"data"}
    assert set(differing({"a": base.fields, "b": others["split"].fields})) == {"split.sha256"}


def test_mixing_two_fingerprints_lists_the_fields():
    "Evaluation.md, acceptance 8."
    s = shop()
    a = make_plan(s, s.test, "full", seen_filter="none", split="test")
    b = quiet(s, s.test, "uni9", seen_filter="none", split="test")
    check_same({"a": a.fields, "again": dict(a.fields)})
    with pytest.raises(EvalError) as e:
        check_same({"a": a.fields, "b": b.fields})
    for told in ("protocol: a 'full', b 'uni9'", "negatives", a.fingerprint, b.fingerprint, "Re-evaluate"):
        assert told in str(e.value)
    with pytest.raises(EvalError, match="unknown"):
        check_same({"a": a.fields, "paper": {}})


# ---- chance, slices, decoder ----


@pytest.mark.parametrize("protocol", ["full", "uni20", "pop20", "fixed20"])
def test_constant_scores_earn_chance(protocol):
    s = shop()
    plan = quiet(s, s.test, protocol, seen_filter="none", split="test", candidate_file=[f"i{k}" for k in range(1, 21)])
    ranks = rank_cases(lambda b: torch.zeros(len(b), 61), s, s.test, [plan], batch_size=64, max_len=20)[plan.name]
    row, luck = table(ranks, suffix=plan.name), chance_row(plan)
    assert luck and all(row[k] == pytest.approx(v, abs=1e-12) for k, v in luck.items())
    k, bracket = (10, "") if protocol == "full" else (10, f"[{protocol}]")
    assert luck[f"HR@10{bracket}"] == pytest.approx(k / (60 if protocol == "full" else 21), abs=1e-12)


def test_slices_split_exactly():
    "overall = rho repeat + (1 - rho) novel, and the other slices part the cases too."
    s = shop(n=400)
    plan = make_plan(s, s.test, "full", seen_filter="none", split="test")
    rng = torch.Generator().manual_seed(1)
    ranks = rank_cases(lambda b: torch.randint(0, 9, (len(b), 61), generator=rng).float(), s, s.test, [plan], batch_size=64, max_len=20)[""]
    masks = slices(s, s.test)
    assert list(masks) == ["repeat", "novel", "after_view", "after_buy"]
    for part in (
        [masks["repeat"], masks["novel"]],
        [masks["after_view"], masks["after_buy"]],
        list(length_slices(s.test).values()),
        list(popularity_slices(s, s.test).values()),
    ):
        assert (sum(m.astype(int) for m in part) == 1).all()
    found, whole = by_slice(ranks, masks), table(ranks)
    rho = masks["repeat"].mean()
    for name in ("HR@10", "NDCG@10", "MRR@10"):
        assert whole[name] == pytest.approx(rho * found["repeat"]["metrics"][name] + (1 - rho) * found["novel"]["metrics"][name], abs=1e-12)
    few = by_slice(ranks, {"few": np.arange(400) < 29, "none": np.zeros(400, bool)})
    assert few == {"few": {"n": 29, "metrics": "not measurable"}, "none": {"n": 0, "metrics": "not measurable"}}


def test_without_done_equals_slow():
    s = shop()
    slow = [not (set(s.behavior[a:b].tolist()) & {2}) for a, b in zip(s.test.start, s.test.stop)]
    assert without_done(s, s.test, [2]).tolist() == slow and 0 < sum(slow) < len(slow)
    assert without_done(s, s.test, []).all()


@pytest.mark.parametrize(
    "V, m, rank, hr",
    [
        (31_240, 100, 1000, 0.9986),
        (31_240, 100, 2000, 0.893),
        (31_240, 100, 3000, 0.505),
        (99_037, 99, 1000, 1.0),
        (99_037, 99, 5000, 0.972),
        (99_037, 99, 10_000, 0.452),
        (1_682, 100, 100, 0.930),
        (1_682, 100, 200, 0.241),
    ],
)
def test_decoder_table(V, m, rank, hr):
    "Evaluation.md, section 5, to three digits."
    assert decode("HR", 10, f"uni{m}", V, rank, replacement=True) == pytest.approx(hr, abs=6e-4)


def test_decoder():
    assert decode("NDCG", 10, "uni99", 99_037, 1000, replacement=True) == pytest.approx(0.725, abs=5e-4)
    assert decode("HR", 10, "uni9", 100, 1) == decode("HR", 10, "uni9", 100, 100) == pytest.approx(1)  # K = 10 of 10
    rng = np.random.default_rng(0)  # by drawing
    better = np.array([(rng.choice(49, 9, replace=False) < 19).sum() for _ in range(20_000)])
    assert decode("HR", 3, "uni9", 50, 20) == pytest.approx((better < 3).mean(), abs=0.012)
    assert decode("MRR", 3, "uni9", 50, 20) == pytest.approx(np.where(better < 3, 1 / (better + 1), 0).mean(), abs=0.012)
    assert least_first(0.9, 0.85) == pytest.approx(0.8) and least_share(0.843, "uni100", 31_240, 100) == pytest.approx(0.428, abs=2e-3)
    assert estimated_rank(np.array([1, 2]), "uni99", 100).tolist() == [1, 2]
    for wrong in ("fixed100", "pop100", "full"):
        with pytest.raises(EvalError, match="cannot be decoded"):
            decode("HR", 10, wrong, 31_239, 10)


def test_warns_where_sampling_saves_nothing():
    s = shop()
    with pytest.warns(UserWarning, match=r"9 of 60 items \(15 %\)"):
        make_plan(s, s.test, "uni9", seen_filter="none", split="test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(s, s.test, "uni6", seen_filter="none", split="test")
        make_plan(s, s.test, "full", seen_filter="none", split="test")


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_seed_is_checked(seed):
    s = shop()
    with pytest.raises(EvalError, match="whole number"):
        quiet(s, s.test, "uni9", seen_filter="none", split="test", seed=seed)


def test_no_cases():
    s = shop()
    nobody = s.test.take(slice(0, 0))
    for name in ("full", "uni5", "fixed2"):
        plan = make_plan(s, nobody, name, seen_filter="none", split="test", candidate_file=["i1", "i2"])
        assert len(plan.m) == 0 and chance_row(plan) == {}
    assert seen_items(s, nobody, "all_seen")[0].tolist() == [0]
