"""What printed tables give away: rank bounds, hit lattices, identities on random tables, replays; the true-rank decoder."""
import numpy as np
import pytest

from mbnb.evaluators.metrics import check_identities, per_case
from mbnb.evaluators.protocols import decode, estimated_rank, least_first, least_share
from mbnb.evaluators.ranks import EvalError, Ranks
from mbnb.evaluators.sampled import decoded, top_share
from mbnb.evaluators.tables import (best_of, chance_z, fits_cases, hit_lattice, implied_hits, mean_rank_floor, rank_bounds, relative,
                                    relative_range, slope, smallest_cases, stop_epoch)

KS = (1, 5, 10, 20, 50)

# two rows that were published: the first holds, the second contradicts itself from cutoff 10 on
HELD = {"HR@5": .91, "HR@10": .9235, "HR@101": 1., "NDCG@5": .885, "NDCG@10": .8893, "NDCG@101": .9033,
        "MRR@5": .8766, "MRR@10": .8784, "MRR@101": .8804}
SLIPPED = {"NDCG@1": .6200, "NDCG@5": .7063, "NDCG@10": .7244, "NDCG@20": .7384, "NDCG@50": .7524,
           "Recall@1": .6200, "Recall@5": .7803, "Recall@10": .8915, "Recall@20": .9618, "Recall@50": .9618}
RECALL5 = [9.30, 49.35, 79.25, 87.60, 87.20, 88.25, 87.30, 87.75, 91.00, 88.45,
           87.80, 90.15, 87.20, 89.15, 88.80, 85.75, 89.60, 86.75, 89.70, 89.30]
RECALL10 = [19.05, 58.55, 82.20, 88.90, 88.50, 89.30, 88.60, 88.70, 92.35, 90.05,
            89.30, 91.15, 89.40, 91.00, 90.05, 86.95, 90.35, 87.70, 90.55, 90.35]
NDCG10 = [8.64, 43.50, 74.19, 85.91, 85.60, 87.18, 86.15, 86.12, 88.93, 86.76,
          86.54, 88.52, 86.37, 87.19, 86.45, 84.08, 87.74, 85.68, 88.05, 87.53]
NINE = [.1674, .2633, .3081, .1706, .3113, .4936, .1812, .2974, .4904]


# ---- random tables ----

def random_ranks(rng):
    "-> (ranks (N,), m): geometric, log-normal, half knowing half guessing, or guessing."
    m, n = int(rng.integers(60, 5000)), int(np.exp(rng.uniform(np.log(200), np.log(20_000))))
    r = [lambda: rng.geometric(np.exp(rng.uniform(np.log(.01), np.log(.9))), n),
         lambda: np.exp(np.abs(rng.normal(rng.uniform(0, 4), rng.uniform(.5, 2.5), n))).astype(np.int64),
         lambda: np.where(rng.random(n) < rng.random(), rng.geometric(rng.uniform(.1, .95), n), rng.integers(1, m + 1, n)),
         lambda: rng.integers(1, m + 1, n)][rng.integers(4)]()
    return np.clip(r, 1, m), m


def row_of(ranks, digits=4):
    "A printed row of HR, NDCG and MRR."
    worth = {"HR": np.ones(len(ranks)), "NDCG": 1 / np.log2(ranks + 1), "MRR": 1 / ranks}
    return {f"{x}@{k}": round(float((w * (ranks <= k)).mean()), digits) for x, w in worth.items() for k in KS}


@pytest.fixture(scope="module")
def tables():
    "2,000 of (row, m, the row with its HR column slipped by one from a random cutoff on)."
    rng, out = np.random.default_rng(0), []
    for _ in range(2000):
        ranks, m = random_ranks(rng)
        row = row_of(ranks)
        slipped = row | {f"HR@{KS[c]}": row[f"HR@{KS[c + 1]}"] for c in range(int(rng.integers(0, 4)), 4)}
        out.append((row, m, slipped))
    return out


def test_valid_tables_raise_no_alarm(tables):
    assert not any(check_identities(row, 1e-4, m) for row, m, _ in tables)


@pytest.mark.parametrize("cells", ["HR NDCG MRR", "HR NDCG"])
def test_slipped_columns_are_found(tables, cells):
    def part(row): return {k: v for k, v in row.items() if k.split("@")[0] in cells.split()}
    changed = [(part(row), m, part(bad)) for row, m, bad in tables if bad != row]
    missed = [(row, m, bad) for row, m, bad in changed if not check_identities(bad, 1e-4, m)]
    assert len(changed) > 1800 and len(missed) <= .01 * len(changed), f"{len(missed)} of {len(changed)} missed"
    possible = sum(rank_bounds(bad, 1e-4, m) is not None for _, m, bad in missed)
    assert possible >= len(missed) - 2          # what is missed is a table that some ranking does print


def test_bounds_hold_the_truth():
    rng = np.random.default_rng(1)
    for _ in range(150):
        ranks, m = random_ranks(rng)
        row = row_of(ranks)
        bounds = rank_bounds(row, 1e-4, m)
        assert bounds["mean_rank"][0] - 1e-6 <= ranks.mean() <= bounds["mean_rank"][1] + 1e-6
        assert bounds["first"][0] - 1e-6 <= (ranks == 1).mean() <= bounds["first"][1] + 1e-6
        mrr = float((1 / ranks).mean())
        assert mean_rank_floor((ranks <= 10).mean(), (np.where(ranks <= 10, 1 / ranks, 0)).mean(), mrr, 10) <= ranks.mean() + 1e-9


# ---- one published row that holds ----

def test_mean_rank_of_a_row_with_mrr_near_one():
    bounds = rank_bounds(HELD, 1e-4, 101)
    np.testing.assert_allclose(bounds["mean_rank"], (4.66, 6.66), atol=.005)
    np.testing.assert_allclose(bounds["first"], (.851, .861), atol=5e-4)
    assert check_identities(HELD, 1e-4) == []
    assert round(1 / HELD["MRR@10"], 2) == 1.14                                # what was called the average rank
    floor = mean_rank_floor(.9235, .8784, .8804, 10)
    assert abs(floor - (.9235 + .0765 ** 2 / .002)) < 1e-9 and floor < bounds["mean_rank"][0]


def test_rank_bounds_in_other_shapes():
    assert rank_bounds(HELD | {"HR@10": .95}, 1e-4, 101) is None
    wide = rank_bounds({"Recall@10": .9235}, 1e-4, 101)
    assert wide["first"][0] < 1e-6 and wide["first"][1] > .92
    big = rank_bounds({k: v for k, v in HELD.items() if "101" not in k}, 1e-4, 31_239)
    assert big["mean_rank"][1] > 2000 and abs(big["first"][0] - .851) < 5e-4   # without the tail only the top is known
    assert rank_bounds(HELD | {"MRR": .8804}, 1e-4, 101)["mean_rank"][0] >= 4.66 - 1e-3
    with pytest.raises(EvalError, match="expected at least one"): rank_bounds({"loss": 1.}, 1e-4, 101)
    with pytest.raises(EvalError, match="mixes protocols"): rank_bounds({"HR@5": .1, "HR@10[uni99]": .2}, 1e-4, 101)


def test_forty_recalls_are_two_thousand_cases():
    values = np.array(RECALL5 + RECALL10) / 100
    cases, chance = hit_lattice(values, 1e-4)
    assert cases == 2000 and len(set(values)) == 34 and abs(np.log(chance) / np.log(5) + 34) < 1e-6
    assert fits_cases(values, 1e-4, 2000) and not fits_cases(values, 1e-4, 500) and not fits_cases(values, 1e-4, 1000)
    assert fits_cases(values, 1e-4, 30_691)                                    # whole numbers alone cannot refute a large set
    assert smallest_cases(values, 1e-4)[0] == 2000


def test_curve_and_early_stopping():
    curve = [v / 100 for v in NDCG10]
    assert stop_epoch(curve, 3, strict=False, first=-1) == (10, 7)
    assert stop_epoch(curve, 3, strict=True, first=-1) == (11, 7)
    assert stop_epoch(curve, 2, strict=False, first=-1) == (6, 4)              # misses the best
    assert stop_epoch(curve, 10, strict=True, first=-1) == (18, 7)             # as it did
    assert stop_epoch(curve, 11, strict=True, first=-1) == (None, 7)
    np.testing.assert_allclose(slope(curve[9:]), (.0001, .0012), atol=5e-5)
    top = best_of(curve[3:])
    assert (top["n"], top["best"]) == (17, 5)
    np.testing.assert_allclose((top["z"], top["expected_max"]), (1.82, 1.79), atol=.005)
    assert round(chance_z(.1905, 10 / 101, 2000), 1) == 13.7


def test_percentages():
    assert round(100 * relative(.0864, .4350)) == 403
    low, high = relative_range(.0864, .4350, 1e-4, 1e-4)
    assert 4.02 < low < 4.035 < high < 4.05
    low, high = relative_range(.31, .40, .01, .01)
    assert low < .4 / .3113 - 1 < high
    assert relative_range(-.2, -.1, .01, .01)[0] < relative(-.2, -.1) < relative_range(-.2, -.1, .01, .01)[1]
    assert np.isnan(relative(0, 1)) and relative_range(0., 1., .01, .01) == (-np.inf, np.inf)


# ---- one that does not, and one too small for its claim ----

def test_row_with_a_slipped_column():
    found = [b for b in check_identities(SLIPPED, 1e-4) if b.rule == 2]
    assert [b.what for b in found] == ["NDCG@10 - NDCG@5", "NDCG@20 - NDCG@10", "NDCG@50 - NDCG@20"]
    np.testing.assert_allclose([b.found for b in found], [.0181, .0140, .0140], atol=1e-9)
    np.testing.assert_allclose([(b.low, b.high) for b in found], [(.0321, .0396), (.0160, .0196), (0, 0)], atol=6e-5)
    implied = implied_hits(SLIPPED, 5)
    outward = [(np.floor(1e3 * implied[k][0]) / 1e3, np.ceil(1e3 * implied[k][1]) / 1e3) for k in (10, 20, 50)]
    assert outward == [(.831, .843), (.881, .905), (.943, .984)]
    assert rank_bounds(SLIPPED, 1e-4, 100) is None
    right = {k: v for k, v in SLIPPED.items() if k not in ("Recall@10", "Recall@50")} | {"Recall@20": .8915, "Recall@50": .9618}
    assert check_identities(right, 1e-4) == [] and rank_bounds(right, 1e-4, 100)
    for name in SLIPPED:                                                       # no other value of one cell repairs it
        assert rank_bounds({k: v for k, v in SLIPPED.items() if k != name}, 1e-4, 100) is None


def test_nine_hit_rates_refute_the_claimed_users():
    n, chance = smallest_cases(NINE, 1e-4)
    assert n == 938 and chance < 1e-6
    assert fits_cases(NINE, 1e-4, 938) and not fits_cases(NINE, 1e-4, 943)
    assert smallest_cases(NINE[:1], 1e-4)[1] > .01                             # a single value proves nothing


def test_chance_of_smallest_cases_is_honest():
    rng = np.random.default_rng(2)
    for k in (3, 6, 12):
        chances = np.array([smallest_cases(np.round(rng.random(k), 4), 1e-4)[1] for _ in range(300)])
        assert (chances < .01).mean() <= .03 and (chances < .1).mean() <= .15
    for n in (137, 512, 999):
        hits = rng.integers(1, n, 12)
        assert smallest_cases(np.round(hits / n, 4), 1e-4)[0] == n // np.gcd.reduce(np.append(hits, n))


# ---- the decoder ----

@pytest.mark.parametrize("v, m, rank, hr", [(31_240, 100, 1000, .9986), (31_240, 100, 2000, .893), (31_240, 100, 3000, .505),
                                            (99_037, 99, 1000, 1.), (99_037, 99, 5000, .972), (99_037, 99, 10_000, .452),
                                            (1682, 100, 100, .930), (1682, 100, 200, .241)])
def test_decoder_table(v, m, rank, hr):
    assert abs(decode("HR", 10, f"uni{m}", v, rank, replacement=True) - hr) < 5e-4
    assert abs(decode("HR", 10, f"uni{m}", v, rank) - hr) < .01                # without replacement: nearly the same


def test_decoder_of_a_whole_row():
    assert abs(decode("NDCG", 10, "uni99", 99_037, 1000, replacement=True) - .725) < 5e-4
    p1 = least_first(HELD["HR@5"], HELD["MRR@5"])
    assert abs(p1 - .8432) < 1e-9 and p1 < rank_bounds(HELD, 1e-4, 101)["first"][0]
    assert abs(least_share(.843, "uni100", 31_239, 100) - .428) < 2e-3
    assert decode("HR", 10, "uni100", 31_239, 1000) > HELD["HR@10"]            # one column alone allows every target at rank 1,000
    assert estimated_rank(1, "uni100", 31_239) == 1
    for wrong in ("pop99", "fixed100", "full"):
        with pytest.raises(EvalError, match="cannot be decoded"): decode("HR", 10, wrong, 31_239, 10)


def made(g, e, m):
    "Ranks from counts."
    i32 = lambda x: np.broadcast_to(np.asarray(x, np.int32), len(g)).copy()
    return Ranks(np.arange(len(g)), np.arange(len(g)), i32(1), i32(g), i32(e), i32(m), np.zeros(len(g), bool))


@pytest.mark.parametrize("metric", ["HR", "NDCG", "MRR"])
def test_decoded_runs_equal_the_mean_of_many_draws(metric):
    "Exact ranks with ties, 4,000 draws of 7 of 29 others: the decoded value is what the draws give on average."
    rng = np.random.default_rng(3)
    g, e = np.array([0, 3, 10, 29, 5, 0]), np.array([0, 2, 5, 0, 20, 28])
    drawn = np.zeros((4000, len(g)))
    for i, (above, ties) in enumerate(zip(g, e)):
        kind = np.repeat([0, 1, 2], [above, ties, 29 - above - ties])
        picks = kind[rng.permuted(np.tile(np.arange(29), (4000, 1)), axis=1)[:, :7]]
        drawn[:, i] = per_case(made((picks == 0).sum(1), (picks == 1).sum(1), 8), metric, 3)
    ours = decoded(made(g, e, 30), metric, 3, "uni7")
    np.testing.assert_allclose(ours, drawn.mean(0), atol=4 * .5 / 4000 ** .5)
    np.testing.assert_allclose(decoded(made(g[:4], [0] * 4, 30), metric, 3, "uni7"), decode(metric, 3, "uni7", 30, g[:4] + 1))


def test_decoded_misses_and_refusals():
    assert decoded(made([30, 0], [0, 0], 30), "HR", 3, "uni7").tolist() == [0, 1]
    assert decoded(made([30, 0], [0, 1], 30), "HR", 3, "uni7")[0] == 0
    with pytest.raises(EvalError, match="cannot be decoded"): decoded(made([0], [0], 30), "HR", 3, "pop7")


def test_top_share_never_exceeds_the_truth():
    rng = np.random.default_rng(4)
    for _ in range(40):
        true = np.clip(rng.geometric(rng.uniform(.002, .2), 3000), 1, 5000)
        ranks = 1 + rng.hypergeometric(true - 1, 5000 - true, 99)
        row = {f"{x}@{k}": round(float((w * (ranks <= k)).mean()), 4) for k in (5, 10)
               for x, w in (("HR", np.ones(3000)), ("NDCG", 1 / np.log2(ranks + 1)), ("MRR", 1 / ranks))}
        for R in (10, 50, 200, 1000):
            assert top_share(row, 1e-4, "uni99", 5000, R) <= (true <= R).mean() + 3 * .5 / 3000 ** .5
    assert top_share(row, 1e-4, "uni99", 5000, 5000) == 1
    with pytest.raises(EvalError, match="no ranking"): top_share(row | {"HR@10": 0.}, 1e-4, "uni99", 5000, 10)
