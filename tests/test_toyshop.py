"""The stored shop, its oracle's ranks, and what the shop was calibrated to."""
import hashlib
import re
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mbnb.evaluators.baselines import rank_baselines
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan, slices
from mbnb.evaluators.ranks import Ranks
from mbnb.evaluators.stats import bootstrap_ci
from mbnb.events import DataError
from mbnb.sequences import from_events
from mbnb.toyshop import BEHAVIORS, BUY, CART, SIZES, VIEW, ToyShop, make_shop, make_tables, oracle_table, write_shop

DATA = Path(__file__).resolve().parents[1] / "data"
FILES = ("toyshop-small.parquet", "toyshop-small-oracle.npz")


@pytest.fixture(scope="module")
def shop(): return make_shop(SIZES["small"])


@pytest.fixture(scope="module")
def sequences(shop): return from_events(shop.events, name="toyshop", behaviors=BEHAVIORS)


@pytest.fixture(scope="module")
def stored():
    with np.load(DATA / FILES[1], allow_pickle=False) as arrays: return dict(arrays)


def ndcg(g, e, n_items=1000):
    n = len(g)
    zero = np.zeros(n, np.int64)
    return per_case(Ranks(zero, zero, zero.astype(np.int32), g, e, np.full(n, n_items, np.int32), zero.astype(bool)), "NDCG", 10)


# ---- the files ----

@pytest.mark.parametrize("name", FILES)
def test_stored_file_has_the_hash_of_the_readme(name):
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    listed = dict(reversed(pair) for pair in re.findall(r"^([0-9a-f]{64})  (\S+)$", readme, re.M))
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == listed[name]


def test_generator_makes_the_stored_events(shop):
    stored = pl.read_parquet(DATA / FILES[0])
    made = shop.events.frame.drop("row")
    assert stored.schema == made.schema
    assert stored.equals(made)


def test_oracle_makes_the_stored_ranks(shop, stored):
    made = oracle_table(shop)
    assert set(stored) == set(made)
    for name, values in made.items():
        assert stored[name].dtype == values.dtype
        assert (stored[name] == values).mean() > .999, name     # two probabilities may differ in the last bit on another processor


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shop(tmp_path / folder, "tiny")
    for a in (tmp_path / "a").iterdir(): assert a.read_bytes() == (tmp_path / "b" / a.name).read_bytes()


# ---- the process ----

def test_time_rises_within_a_user_and_histories_have_an_input(shop):
    user = np.repeat(np.arange(len(shop.users)), shop.length)
    assert (np.diff(shop.time)[np.diff(user) == 0] >= 1).all()
    assert shop.length.min() >= 3 and 30 <= shop.length.mean() <= 50
    assert len(shop.events) == len(shop.item) == shop.length.sum()


def test_funnel_odds_are_those_of_the_config(shop):
    c, inside = shop.config, np.diff(np.repeat(np.arange(len(shop.users)), shop.length)) == 0
    before, after = shop.behavior[:-1][inside], shop.behavior[1:][inside]
    same = shop.item[:-1][inside] == shop.item[1:][inside]
    carted = ((before == VIEW) & same & (after == CART)).sum() / (before == VIEW).sum()
    bought = ((before == CART) & same & (after == BUY)).sum() / (before == CART).sum()
    # a trip may end at the item it began at, so a few more than the funnel's
    assert c.after_view[0] - .005 < carted < c.after_view[0] + .005
    assert c.after_cart - .02 < bought < c.after_cart + .02


def test_sizes_share_no_numbers_and_a_seed_makes_another_shop():
    assert {(s.n_users, s.n_items) for s in SIZES.values()} == {(200, 100), (3000, 1000), (100_000, 20_000)}
    assert len({s.seed for s in SIZES.values()}) == 3
    tiny = make_shop(SIZES["tiny"])
    assert not np.array_equal(tiny.taste, make_shop(replace(SIZES["tiny"], seed=1)).taste)
    assert not np.array_equal(tiny.taste, make_shop(replace(SIZES["tiny"], n_users=201)).taste[:200])


def test_behavior_effect_changes_nothing_but_the_second_table():
    on, off = (make_tables(replace(SIZES["tiny"], behavior_effect=effect)) for effect in (1., 0.))
    for f in fields(on):
        if f.name not in ("matched", "config"): assert np.array_equal(getattr(on, f.name), getattr(off, f.name)), f.name
    assert on.matched[BUY] > 0 and not off.matched.any()


@pytest.mark.parametrize("field, value", [
    ("n_items", 1010), ("n_items", 20), ("n_users", 0), ("behavior_effect", -.1), ("steps", (.5, .4)), ("arrive", (1., 0.)),
    ("after_view", (.9, .1)), ("favorites", (.01,) * 100), ("length", (44, .5, 2, 150))])
def test_a_config_that_does_not_fit_names_its_field(field, value):
    with pytest.raises(DataError, match=field): ToyShop(**{field: value})


# ---- the calibration ----

@pytest.fixture(scope="module")
def lines(shop, sequences, stored):
    "NDCG@10 by test case: the oracle, the best reader without behaviors, the rules of pairs."
    plan = make_plan(sequences, sequences.test, "full", seen_filter="none", split="test")
    ranks = rank_baselines(sequences, sequences.test, [plan], names=("markov", "markov_behavior"))
    values = {name: per_case(next(iter(plans.values())), "NDCG", 10) for name, plans in ranks.items()}
    return values | {"blind": ndcg(stored["blind_test_g"], stored["blind_test_e"]), "oracle": ndcg(stored["test_g"], stored["test_e"])}


def test_cases_stand_in_the_order_of_the_stored_ranks(shop, sequences, stored):
    last = shop.start + shop.length - 1
    assert (sequences.items[sequences.test.target] == shop.items[shop.item[last]]).all()
    assert (sequences.items[sequences.valid.target] == shop.items[shop.item[last - 1]]).all()
    assert np.array_equal(slices(sequences, sequences.test)["after_buy"], stored["behavior_before_test"] == BUY)


def test_context_pays(lines):
    mean = {name: values.mean() for name, values in lines.items()}
    assert mean["markov"] <= .75 * mean["oracle"]
    assert mean["markov"] < mean["markov_behavior"] <= .85 * mean["blind"]
    assert .95 * mean["oracle"] <= mean["blind"] < mean["oracle"]


def test_behavior_pays_after_a_buy(lines, stored):
    bought = stored["behavior_before_test"] == BUY
    assert bought.sum() >= 200
    low, _ = bootstrap_ci((lines["oracle"] - lines["blind"])[bought])
    assert low > .1
    assert lines["markov"][bought].mean() < lines["markov_behavior"][bought].mean() < lines["oracle"][bought].mean()
    assert (lines["oracle"] - lines["blind"])[~bought].mean() < .02         # and hardly anywhere else


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_is_calibrated_too(seed):
    shop = make_shop(replace(SIZES["small"], seed=seed))
    users = np.arange(1000)
    oracle, blind = (ndcg(*shop.oracle_ranks(blind=blind, users=users)).mean() for blind in (False, True))
    assert .94 * oracle < blind < oracle and .7 < oracle < .85


def test_oracle_is_probable_itself(shop):
    "Its probabilities come true: the share of cases whose target is its first choice equals the mean probability of that choice."
    users, first = np.arange(400), []
    for s, n in zip(shop.start[users], shop.length[users], strict=True):
        seen = slice(s, s + n - 1)
        first.append(shop.oracle(shop.items[shop.item[seen]], [BEHAVIORS[b] for b in shop.behavior[seen]]).max())
    first = np.array(first)
    hits = shop.oracle_ranks(users=users)[0] == 0
    assert abs(hits.mean() - first.mean()) < 4 * (first * (1 - first)).sum() ** .5 / len(users)


@pytest.mark.slow
def test_large_is_made_in_time():
    start = time.process_time()
    shop = make_shop(SIZES["large"])
    assert len(shop.events) > 3_000_000
    assert time.process_time() - start < 120
    assert .6 < ndcg(*shop.oracle_ranks(users=np.arange(512)), 20_000).mean() < .95
