"""Metrics against trec_eval, scikit-learn, brute force and RecTools' definition; the identities of a row."""
import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from mbnb.evaluators.metrics import (KS, MULTI, check_identities, chance, multi_table, multi_target, per_case, repeat_novel, table,
                                     tie_groups)
from mbnb.evaluators.ranks import EvalError, Ranks, count_ranks

GOLDEN = Path(__file__).parent / "golden"
OURS = {"Success": "HitRate", "R": "Recall", "P": "Precision", "nDCG": "NDCG", "AP": "MAP", "RR": "MRR"}


def counts(scores, targets):
    "-> case, g, e, m (T,): our counts for rows of scores (N,M) and a list of N target arrays; column 0 is put in front as the pad."
    case = np.repeat(np.arange(len(scores)), [len(t) for t in targets])
    padded = torch.from_numpy(np.insert(scores.astype(np.float32), 0, -np.inf, axis=1)[case])
    g, e = count_ranks(padded, torch.from_numpy(np.concatenate(targets).astype(np.int64) + 1))
    return case, g.numpy(), e.numpy(), np.full(len(case), scores.shape[1])


def ranks(g, e, m, repeat=None, user=None):
    n = len(g)
    as32 = lambda x: np.broadcast_to(np.asarray(x, np.int32), n).copy()
    return Ranks(np.arange(n), np.arange(n) if user is None else np.asarray(user), np.ones(n, np.int32), as32(g), as32(e), as32(m),
                 np.zeros(n, bool) if repeat is None else repeat)


def compare(scores, targets, values, measures, cutoffs, tolerance=1e-9):
    "Our metrics, from the scores on, against `values` (N, measures, cutoffs); -> number of values compared."
    case, g, e, m = counts(scores, targets)
    groups, n = tie_groups(case, g, e, m), np.array([len(t) for t in targets])
    for (i, name), (j, k) in itertools.product(enumerate(measures), enumerate(cutoffs)):
        ours = multi_target(groups, OURS[name], int(k))
        if name == "AP": ours = ours * np.minimum(k, n) / n          # trec_eval divides by n, not by what K allows
        np.testing.assert_allclose(ours, values[:, i, j], rtol=0, atol=tolerance, err_msg=f"{name}@{k}")
    single = np.flatnonzero(n == 1)
    first = np.append(0, np.cumsum(n))[single]
    one = ranks(g[first], e[first], m[first])
    for name, (j, k) in itertools.product(("HR", "Recall", "Precision", "NDCG", "MRR", "MAP"), enumerate(cutoffs)):
        i = list(measures).index({"HR": "Success", "Recall": "R", "Precision": "P", "NDCG": "nDCG", "MRR": "RR", "MAP": "AP"}[name])
        np.testing.assert_allclose(per_case(one, name, int(k)), values[single, i, j], rtol=0, atol=tolerance, err_msg=f"{name}@{k}")
    return values.size, len(single)


def test_golden_trec_eval():
    "1,000 stored cases, half of them with one target; values of trec_eval. Runs without the library."
    d = np.load(GOLDEN / "metrics.npz")
    targets = np.split(d["targets"], d["offsets"][1:-1])
    assert tuple(d["cutoffs"]) == KS
    size, single = compare(d["scores"], targets, d["values"], d["measures"], d["cutoffs"])
    assert size == 1000 * 6 * 5 and single >= 500


def test_live_trec_eval():
    "The same on freshly drawn cases, scored now by trec_eval through ir-measures."
    pytest.importorskip("ir_measures", reason="ir-measures is not installed (extra: xcheck); the golden file covers the same ground")
    pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed (extra: xcheck)")
    make = runpy.run_path(str(GOLDEN / "make_metrics.py"))
    for seed, most in ((11, 1), (12, 20)):
        scores, targets = make["draw"](250, 100, seed, most)
        compare(scores, targets, make["trec_values"](scores, targets), make["MEASURES"], make["CUTOFFS"])


@pytest.mark.parametrize("most", [1, 6])
def test_tied_ndcg_equals_sklearn(most):
    "scikit-learn averages NDCG over ties as we do."
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra: dev)")
    rng = np.random.default_rng(most)
    scores = rng.integers(0, 6, (300, 40))
    targets = [np.sort(rng.choice(40, rng.integers(1, most + 1), replace=False)) for _ in range(300)]
    groups = tie_groups(*counts(scores, targets))
    assert (groups.size > 1).mean() > .5                                 # the test is about ties
    truth = np.zeros((300, 40))
    for i, t in enumerate(targets): truth[i, t] = 1
    for k in (1, 5, 10, 20):
        theirs = [metrics.ndcg_score(truth[i:i + 1], scores[i:i + 1], k=k) for i in range(300)]
        np.testing.assert_allclose(multi_target(groups, "NDCG", k), theirs, rtol=0, atol=1e-9)


def definition(rank, hit, metric, k):
    "Mean of a metric over orders (P,M), each written as the rank of every candidate."
    n, inside = hit.sum(), (rank <= k) & hit
    found = inside.sum(1)
    before = ((rank[:, None, :] <= rank[:, :, None]) & hit).sum(2)
    ideal = (1 / np.log2(np.arange(2, min(k, n) + 2))).sum()
    return {"HitRate": found > 0, "Recall": found / n, "RecallCap": found / min(k, n), "Precision": found / k,
            "NDCG": (inside / np.log2(rank + 1)).sum(1) / ideal, "MRR": np.where(inside, 1 / rank, 0).max(1),
            "MAP": np.where(inside, before / rank, 0).sum(1) / min(k, n)}[metric].mean()


def test_brute_force_orders():
    "Up to seven candidates: the mean over all orders that the scores allow, for every metric and cutoff."
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(60):
        m = int(rng.integers(2, 8))
        scores = rng.integers(0, 4, (1, m)).astype(float)
        hit = rng.random(m) < .4
        hit[rng.integers(m)] = True
        p = np.array(list(itertools.permutations(range(m))))
        best = np.take_along_axis(p, np.argsort(-scores[0][p], axis=1, kind="stable"), 1)
        rank = np.empty_like(p)
        np.put_along_axis(rank, best, np.arange(1, m + 1)[None], 1)
        groups = tie_groups(*counts(scores, [np.flatnonzero(hit)]))
        for metric, k in itertools.product(MULTI, range(1, m)):
            ours = multi_target(groups, metric, k)[0]
            if metric == "MAP" and (groups.size[groups.pos < k] > 1).any():
                assert np.isnan(ours)
                continue
            assert abs(ours - definition(rank, hit, metric, k)) < 1e-12, (scores, hit, metric, k)
            compared += 1
    assert compared > 1000


def test_constant_scores_give_exactly_chance():
    for m in (11, 101, 1683):
        everything = ranks([0] * 7, [m - 1] * 7, m)
        for k in [k for k in KS if k < m]:
            assert (per_case(everything, "HR", k) == k / m).all()
            for metric in ("NDCG", "MRR", "Precision", "MAP"):
                np.testing.assert_allclose(per_case(everything, metric, k), chance(metric, k, m), rtol=0, atol=1e-15)


def test_k_at_or_above_m_is_refused_and_left_out_of_the_table():
    r = ranks([0, 3], [0, 1], [21, 20])
    with pytest.raises(EvalError, match="fewest: 20"): per_case(r, "HR", 20)
    with pytest.raises(EvalError): multi_target(tie_groups([0], [3], [0], [10]), "NDCG", 10)
    assert [name for name in table(r) if name.startswith("NDCG")] == ["NDCG@1", "NDCG@5", "NDCG@10"]


def test_a_target_that_was_no_candidate_earns_nothing():
    r = ranks([10, 0], [0, 0], 10)
    for metric, k in (("HR", 9), ("NDCG", 9), ("MRR", 9), ("MRR", None), ("AUC", None)): assert per_case(r, metric, k).tolist() == [0, 1]
    assert per_case(r, "rank").tolist() == [11, 1]


def test_repeat_and_novel_add_up():
    rng = np.random.default_rng(2)
    r = ranks(rng.integers(0, 90, 999), rng.integers(0, 5, 999), 100, repeat=rng.random(999) < .3)
    for metric, k in (("HR", 10), ("NDCG", 10), ("MRR", 5), ("AUC", None), ("rank", None)):
        p = repeat_novel(r, metric, k)
        assert abs(p["overall"] - (p["rho"] * p["repeat"] + (1 - p["rho"]) * p["novel"])) < 1e-12 * max(1, p["overall"])
    alone = repeat_novel(r.take(~r.repeat), "HR", 10)
    assert (alone["rho"], alone["repeat"], alone["n_repeat"]) == (0, None, 0)


def test_mean_over_users_stands_beside_the_mean_over_cases():
    row = table(ranks([0, 0, 0, 50], [0] * 4, 100, user=[1, 1, 1, 2]))
    assert (row["HR@10"], row["HR@10/user"]) == (.75, .5)
    assert not any(name.endswith("/user") for name in table(ranks([0, 50], [0, 0], 100)))


def test_rectools_default_ndcg_is_ours_divided_by_the_full_ideal():
    """RecTools 0.19 divides NDCG by the ideal of K hits also where a case has one target: at K=10 its default is 4.5436 times too small.
    Written from its formula, so that the deviation stays documented without the library."""
    rng = np.random.default_rng(7)
    r = ranks(rng.integers(0, 60, 500), 0, 1000)
    discount = 1 / np.log2(np.arange(2, 12))
    rectools = np.where(r.g < 10, discount[np.minimum(r.g, 9)] / discount.sum(), 0)
    assert round(discount.sum(), 4) == 4.5436
    np.testing.assert_allclose(rectools * discount.sum(), per_case(r, "NDCG", 10), rtol=0, atol=1e-12)
    np.testing.assert_allclose(rectools.mean() * 4.5436, table(r)["NDCG@10"], rtol=1e-4)


def test_identities_hold_for_every_honest_row():
    "Rank tables rounded to four digits: no false alarm; a shifted Recall column is found when the shift is more than rounding."
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(300):
        n = int(rng.integers(50, 3000))
        r = ranks(np.minimum(rng.geometric(rng.uniform(.005, .5), n) - 1, 900), rng.integers(0, 3, n), 1000)
        row = {k: v for k, v in table(r).items() if "@" in k}
        assert check_identities(row) == []
        printed = {k: round(v, 4) for k, v in row.items()}
        assert check_identities(printed, unit=1e-4) == []
        shifted = printed | {f"HR@{b}": printed[f"HR@{a}"] for a, b in zip(KS, KS[1:])} | {"HR@1": 0.}
        found += bool(check_identities(shifted, unit=1e-4))
    assert found == 300


def test_identities_break_where_they_should():
    "Four columns of a printed row: NDCG says that Recall@10 is about .84, where .8915 is printed."
    row = {"NDCG@1": .6200, "NDCG@5": .7063, "NDCG@10": .7244, "NDCG@20": .7384, "NDCG@50": .7524,
           "Recall@1": .6200, "Recall@5": .7803, "Recall@10": .8915, "Recall@20": .9618, "Recall@50": .9618}
    broken = check_identities(row, unit=1e-4)
    assert [(b.rule, b.what) for b in broken] == [(2, "NDCG@10 - NDCG@5"), (2, "NDCG@20 - NDCG@10"), (2, "NDCG@50 - NDCG@20")]
    assert [(round(b.low, 3), round(b.high, 3)) for b in broken[:2]] == [(.032, .040), (.016, .020)]
    assert [b.rule for b in check_identities({"HR@1": .3, "NDCG@1": .2})] == [1, 2]
    assert check_identities({"HR@5": .3, "HR@10": .2})[0].rule == 1
    assert [b.rule for b in check_identities({"HR@10": .97}, m=10)] == [3]


def test_identities_with_several_targets():
    rng = np.random.default_rng(4)
    targets = [np.sort(rng.choice(80, rng.integers(1, 9), replace=False)) for _ in range(200)]
    row = multi_table(tie_groups(*counts(rng.integers(0, 30, (200, 80)), targets)))
    assert any(v == "n/a (ties)" for v in row.values())
    assert check_identities(row, multi=True) == []
    assert [b.rule for b in check_identities(row | {"Recall@50": row["HitRate@50"] + .01}, multi=True)] == [1]
