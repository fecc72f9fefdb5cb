"""Statistics against scipy and against slow and obvious versions; the same seed gives the same digits, in any process."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from mbnb.evaluators.ranks import EvalError
from mbnb.evaluators.stats import (
    bootstrap_ci,
    bootstrap_means,
    bootstrap_table,
    bound_se,
    case_hash,
    compare,
    holm,
    mcnemar,
    over_seeds,
    permutation_test,
    standard_error,
    user_sums,
    words,
    z_of_means,
)


def gains(n, share=0.3, seed=0):
    "NDCG@10-like values: mostly 0, else 1/log2(rank+1)."
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < share, 1 / np.log2(rng.integers(2, 12, n)), 0)


# ---- standard errors ----


def test_standard_error():
    x = gains(999)
    assert standard_error(x) == pytest.approx(scipy.stats.sem(x), rel=1e-12)
    assert standard_error(np.stack([x, 2 * x], 1)) == pytest.approx([scipy.stats.sem(x), 2 * scipy.stats.sem(x)], rel=1e-12)
    assert np.isnan(standard_error([0.5]))


def test_clustered_standard_error_is_that_of_the_bootstrap():
    rng = np.random.default_rng(1)
    users = rng.integers(0, 300, 2000)
    x = (rng.random(300) < 0.3)[users] * rng.random(2000)
    assert standard_error(x, users) == pytest.approx(bootstrap_means(x, users, B=4000).std(ddof=1), rel=0.06)
    assert standard_error(x, users) > 1.5 * standard_error(x)


def test_bound():
    x = (gains(5000) > 0).astype(float)
    assert bound_se(x.mean(), 5000) == pytest.approx(standard_error(x), rel=1e-3)
    y = gains(5000)
    assert bound_se(y.mean(), 5000) > standard_error(y)
    for mean, n in [(1.2, 10), (-0.1, 10), (0.5, 0), (float("nan"), 10)]:
        with pytest.raises(EvalError):
            bound_se(mean, n)


def test_z_of_means():
    "The examples of evaluation.md, section 9."
    assert z_of_means(0.080, 0.074, 22_363) == pytest.approx(2.4, abs=0.05)
    assert z_of_means(0.0155, 0.0148, 22_363) == pytest.approx(0.6, abs=0.05)
    assert z_of_means(0.3, 0.3, 5) == 0 and z_of_means(1.0, 0.0, 5) == np.inf
    assert z_of_means(0.5, 0.4, 100, 400) == pytest.approx(0.1 / np.sqrt(0.25 / 100 + 0.24 / 400))


# ---- bootstrap ----


@pytest.mark.parametrize("n, share", [(60, 0.5), (938, 0.12), (4000, 0.02)])
def test_bootstrap_equals_scipy(n, share):
    x = gains(n, share)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=3000, method="percentile", batch=300, rng=np.random.default_rng(9)
    ).confidence_interval
    assert bootstrap_ci(x, B=3000) == pytest.approx(tuple(theirs), abs=0.15 * standard_error(x))


def test_bootstrap_is_exact_on_three_users():
    "All 27 resamples of three users are equally likely."
    x = np.array([0.0, 1.0, 5.0])
    odds = {}
    for draw in itertools.product(x, repeat=3):
        odds[round(sum(draw) / 3, 9)] = odds.get(round(sum(draw) / 3, 9), 0) + 1 / 27
    got = bootstrap_means(x, B=30_000).round(9)
    for value, p in odds.items():
        assert (got == value).mean() == pytest.approx(p, abs=0.012)
    assert set(got.tolist()) == set(odds)


def test_bootstrap_resamples_users():
    "Equals a loop that draws users and lays their cases end to end."
    rng = np.random.default_rng(3)
    users, x = rng.integers(0, 12, 60), rng.random(60)
    names, fast = np.unique(users), bootstrap_means(x, users, B=4000)
    slow = [np.concatenate([x[users == u] for u in rng.choice(names, len(names))]).mean() for _ in range(4000)]
    assert fast.mean() == pytest.approx(np.mean(slow), abs=0.003) and fast.std() == pytest.approx(np.std(slow), rel=0.06)
    assert np.quantile(fast, [0.025, 0.975]) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.008)


def test_many_metrics_share_the_resamples():
    x = np.stack([gains(500, seed=k) for k in range(4)], 1)
    low, high = bootstrap_ci(x)
    assert low.shape == (4,) and (low < x.mean(0)).all() and (x.mean(0) < high).all()
    for k in range(4):
        assert (low[k], high[k]) == pytest.approx(bootstrap_ci(x[:, k]), abs=1e-12)
    rows = bootstrap_table({"HR@10": x[:, 0], "twice": 2 * x[:, 0]})
    assert rows["twice"] == pytest.approx([2 * v for v in rows["HR@10"]]) and bootstrap_table({}) == {}


def test_bootstrap_repeats():
    x = gains(3000)
    assert bootstrap_ci(x) == bootstrap_ci(x) != bootstrap_ci(x, seed=1)
    assert bootstrap_means(x, block=7000) == pytest.approx(bootstrap_means(x), abs=1e-12)
    assert bootstrap_ci(np.ones(50)) == (1.0, 1.0)


def test_repeats_in_another_process():
    x, y = gains(800), gains(800, seed=1)
    program = (
        f"import sys; sys.path.insert(0, {str(__import__('pathlib').Path(__file__).parent)!r}); from test_stats import gains; "
        "from mbnb.evaluators.stats import bootstrap_ci, compare; a, b = gains(800), gains(800, seed=1); "
        "print(bootstrap_ci(a), compare(a, b))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"{bootstrap_ci(x)} {compare(x, y)}"


# ---- permutation ----


def exact(d):
    "p over all 2^n sign patterns."
    totals = [abs(sum(s * x for s, x in zip(signs, d))) for signs in itertools.product((-1, 1), repeat=len(d))]
    return np.mean([t >= abs(sum(d)) - 1e-12 for t in totals])


@pytest.mark.parametrize("kind", ["distinct", "shared", "with zeros"])
def test_permutation_equals_all_patterns(kind):
    rng = np.random.default_rng(4)
    d = {
        "distinct": rng.normal(0.4, 1, 10),
        "shared": rng.choice([-1.0, 1.0, 1.0, 2.0], 10),
        "with zeros": rng.choice([0.0, 0.0, 0.5, 1.0], 12),
    }[kind]
    p = exact(d)
    assert permutation_test(d, np.zeros(len(d)), flips=40_000) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 40_000) + 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_permutation_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    a, b = gains(300, 0.3, seed), np.where(rng.random(300) < 0.5, gains(300, 0.3, seed), gains(300, 0.2, seed + 9))
    theirs = scipy.stats.permutation_test(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=1000,
        rng=np.random.default_rng(5),
    ).pvalue
    p = permutation_test(a, b)
    assert p == pytest.approx(theirs, abs=4 * np.sqrt(2 * max(p * (1 - p), 1e-4) / 10_000))


def test_permutation_flips_users():
    "Copies of a user's case are no more evidence than the case."
    d = np.random.default_rng(6).normal(0.3, 1, 30)
    p = permutation_test(d, np.zeros(30))
    users = np.repeat(np.arange(30), 10)
    assert permutation_test(np.repeat(d, 10), np.zeros(300), users=users) == pytest.approx(p, abs=0.01)
    assert permutation_test(np.repeat(d, 10), np.zeros(300)) < p / 3


def test_permutation_is_fair():
    "Equal models: p is below .05 in one pair out of twenty."
    rng = np.random.default_rng(7)
    p = [permutation_test(rng.random(80), rng.random(80), flips=400, seed=k) for k in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.085


def test_permutation_edges():
    assert permutation_test(np.ones(60), np.zeros(60)) == 1 / 10_001
    assert permutation_test([1.0, 2.0], [1.0, 2.0]) == 1
    assert permutation_test(gains(99), gains(99, seed=1), seed=2) == permutation_test(gains(99), gains(99, seed=1), seed=2)
    with pytest.raises(EvalError, match="same cases"):
        permutation_test([1.0], [1.0, 2.0])
    with pytest.raises(EvalError, match="NaN"):
        permutation_test([1.0, np.nan], [1.0, 2.0])


# ---- McNemar, Holm ----


@pytest.mark.parametrize("n", [1, 7, 40, 3000])
def test_mcnemar_equals_binomtest(n):
    rng = np.random.default_rng(n)
    a, b = (rng.random(n) < 0.4).astype(float), (rng.random(n) < 0.45).astype(float)
    more, less = int((a > b).sum()), int((a < b).sum())
    assert mcnemar(a, b) == pytest.approx(scipy.stats.binomtest(more, more + less).pvalue if more + less else 1, rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_refuses_shared_hits():
    with pytest.raises(EvalError, match="neither 0 nor 1"):
        mcnemar([0.5, 1], [1, 1])


def test_holm():
    "By hand, ties, limits, and the definition."
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06]) and holm([0.6, 0.7]) == [1, 1] and holm([0.3]) == [0.3]
    p = np.random.default_rng(8).random(12)
    order = sorted(range(12), key=lambda i: p[i])
    slow, high = [0.0] * 12, 0.0
    for place, i in enumerate(order):
        high = max(high, min(1, p[i] * (12 - place)))
        slow[i] = high
    assert holm(p) == pytest.approx(slow)
    assert holm(dict(zip("ab", (0.01, 0.5)))) == {"a": 0.02, "b": 0.5}
    for wrong in ([-0.1], [np.nan], [2]):
        with pytest.raises(EvalError):
            holm(wrong)


# ---- verdicts ----


def test_words():
    assert (
        words(0.01, 0.006) == "no visible change"
        and words(-0.013, 0.006) == "lower on this run"
        and words(0.02, 0.006) == "higher on this run"
    )
    assert words(0.0, 0.0) == "no visible change" and words(0.1, 0.0) == "higher on this run" and words(0.1, np.nan) == "cannot be judged"


def test_compare():
    a, b = gains(2000, 0.35), gains(2000, 0.25, seed=1)
    v = compare(a, b)
    assert v.difference == pytest.approx(a.mean() - b.mean()) and v.low < v.difference < v.high and v.n == v.n_users == 2000
    assert (v.better, v.equal, v.worse) == pytest.approx(((a > b).mean(), (a == b).mean(), (a < b).mean()))
    assert v.words == "higher on this run" and v.p < 0.01 and v.se == pytest.approx(scipy.stats.sem(a - b))
    hit = compare((a > 0) * 1.0, (b > 0) * 1.0)
    assert hit.p_mcnemar == mcnemar((a > 0) * 1.0, (b > 0) * 1.0) and hit.p_mcnemar == pytest.approx(hit.p, abs=0.01)
    assert compare((a > 0) * 1.0, (b > 0) * 1.0, users=np.arange(2000) // 2).p_mcnemar is None
    assert v == compare(a, b)


def test_compare_refuses_other_cases():
    case = np.arange(5)
    one, two = case_hash(case, case, case), case_hash(case, case, case + 1)
    with pytest.raises(EvalError, match="different cases"):
        compare(gains(5), gains(5), cases=(one, two))
    with pytest.raises(EvalError, match=r"\(5,\).*\(4,\)"):
        compare(gains(5), gains(4))
    assert compare(gains(5), gains(5), cases=(one, one)).words == "no visible change"


def test_seeds():
    three = over_seeds([0.101, 0.105, 0.103])
    assert three.sd == pytest.approx(0.002) and three.words == "0.1030 ± 0.0020 (3 seeds)"
    assert over_seeds([0.1]).sd is None and "1 seed;" in over_seeds([0.1]).words


def test_user_sums_refuses():
    for values, users in [([], None), ([np.inf], None), ([1.0, 2.0], [1]), (np.zeros((2, 2, 2)), None)]:
        with pytest.raises(EvalError):
            user_sums(values, users)


def test_no_torch():
    "A finished run is judged without torch."
    subprocess.run([sys.executable, "-c", "import sys, mbnb.evaluators.stats; assert 'torch' not in sys.modules"], check=True)
