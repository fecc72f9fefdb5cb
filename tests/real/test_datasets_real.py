"""The real data sets: sizes, checksums, splits. Skipped with the reason where they are not here."""
import re
import time

import numpy as np
import pytest

from mbnb.datasets import data_file, get, load, locate, spec
from mbnb.events import DataError

pytestmark = pytest.mark.real_data

ML_100K_SPLIT = "d6f61dcee9f5ed10"


@pytest.fixture(scope="module")
def ml_100k(tmp_path_factory):
    try:
        return load("ml-100k")
    except DataError as e:
        pytest.skip(f"ml-100k cannot be had here: {e}")


SIZES = {   # name -> users, items, events, behaviors, validation cases, test cases, time
    "beauty": (22_363, 12_101, 198_502, 1, 22_363, 22_363, "order"),
    "taobao": (815, 55_344, 84_440, 4, None, None, "s"),
    "taobao-category": (810, 1_438, 81_654, 4, None, None, "s"),
    "kuairand": (664, 1_853, 79_688, 8, 664, 664, "ms"),
    "kuairand-impression": (664, 1_853, 33_973, None, 664, 664, "ms"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, shared_data):
    s = load(name)
    users, items, events, behaviors, valid, test, unit = SIZES[name]
    assert (len(s.users), s.n_items, len(s.item), s.unit) == (users, items, events, unit)
    assert behaviors is None or s.n_behaviors == behaviors
    assert valid is None or (len(s.valid), len(s.test)) == (valid, test)
    assert s.leaks.get("own_train_after_test", 0) == 0
    assert s.item.min() == 1 and s.item.max() == items and s.behavior.min() >= 1


@pytest.mark.parametrize("name", ["beauty", "retail_beh", "taobao", "taobao-category", "kuairand", "kuairand-impression"])
def test_every_file_is_what_the_table_says(name, shared_data):
    assert locate(name) == shared_data / spec(name).folder
    for file in spec(name).files | spec(name).extra:
        assert data_file(name, file).is_file()


def test_shared_data_hashes(shared_data):
    "The checksums of the table are those that the folder's own README prints."
    printed = set(re.findall(r"^([0-9a-f]{64})  (\S+)$", (shared_data / "README.md").read_text(), re.M))
    for name in ("beauty", "retail_beh", "kuairand", "taobao"):
        assert {(known, file) for file, known in (spec(name).files | spec(name).extra).items()} <= printed


def test_ml100k(ml_100k):
    assert (len(ml_100k.users), ml_100k.n_items, len(ml_100k.item)) == (943, 1_682, 100_000)
    assert ml_100k.name == "ml-100k" and ml_100k.behaviors == ("", "interact") and ml_100k.unit == "s"
    assert len(ml_100k.valid) == len(ml_100k.test) == 943
    assert ml_100k.leaks["last_two_tied_share"] == pytest.approx(.440, abs=.0005)
    user = np.repeat(np.arange(943), np.diff(ml_100k.offsets))
    tied = (user[1:] == user[:-1]) & (ml_100k.time[1:] == ml_100k.time[:-1])
    assert tied.sum() == 50_561                                                # as the user's event before
    assert (np.append(tied, False) | np.append(False, tied)).sum() == 75_772     # as any other event of the user


def test_ml100k_fingerprint(ml_100k):
    "The canonical order is the row order of the wheel's file; another order of tied rows is another test set."
    assert ml_100k.split_hash.startswith(ML_100K_SPLIT)
    assert spec("ml-100k").split_hash == ml_100k.split_hash


def test_ml100k_is_quick_the_second_time(ml_100k):
    started = time.perf_counter()
    assert get("ml-100k") is not None
    load("ml-100k")
    assert time.perf_counter() - started < 2


def test_ml100k_ratings_on_request(ml_100k):
    s = load("ml-100k", ratings=True)
    assert s.name == "ml-100k-rating-derived"
    counts = dict(zip(s.behaviors[1:], np.bincount(s.behavior, minlength=4)[1:].tolist()))
    assert counts == {"dislike": 6_110 + 11_370, "neutral": 27_145, "like": 34_174 + 21_201}
    assert s.split_hash == ml_100k.split_hash


def test_retail_prefix_families(shared_data):
    s = load("retail_beh")
    assert (len(s.train), len(s.valid), len(s.test)) == (27_560, 3_130, 2_000)
    assert s.n_items == 31_239 and len(s.item) == 491_554
    assert s.behaviors == ("", "view", "cart", "buy", "unknown")
    events = np.bincount(s.behavior, minlength=5)[1:]
    assert events.tolist() == [331_227 + 6_424, 97_022 + 1_989, 48_184, 6_708]
    first = {split: set(s.item[s.cases(split).start].tolist()) for split in ("train", "valid")}
    assert not first["train"] & first["valid"]
    assert {s.behaviors[b] for b in s.target_behaviors} == {"buy"}
    copies = [s.test.target[k] in s.item[s.test.start[k]:s.test.stop[k]] for k in range(2_000)]
    assert sum(copies) == 2_000 - 14


def test_retail_candidates(shared_data):
    candidates = data_file("retail_beh", spec("retail_beh").candidates).read_text().split()
    items = set(load("retail_beh").items)
    assert len(candidates) == len(set(candidates)) == 100 and set(candidates) <= items


def test_kuairand_impressions(shared_data):
    "Whole, before the core: one event per user, video and time, like or hate."
    rows, one = load("kuairand", min_user=0, min_item=0), load("kuairand-impression", min_user=0, min_item=0)
    assert len(rows.item) == 92_734 and int(rows.first.sum()) == len(one.item) == 41_704
    assert {one.behaviors[b] for b in np.unique(one.behavior)} == {"like", "hate"}
    assert rows.split_hash == one.split_hash


def test_kuairand_target_is_not_in_its_own_input(shared_data):
    "All rows of the target's impression leave the input; ties in file order would leave 75.8 % of the answers in it."
    s = load("kuairand")
    for cases in (s.train, s.valid, s.test):
        copies = [cases.target[k] in s.item[cases.start[k]:cases.stop[k]] for k in range(len(cases))]
        assert len(cases) == 664 and np.mean(copies) < .02 and s.first[cases.stop].all()


def test_taobao_repeats(shared_data):
    "The last buy, in the whole log: how often its item or category was seen before."
    for name, users, items, share in (("taobao", 559, 55_344, .628), ("taobao-category", 559, 2_913, .775)):
        s = load(name, min_user=0, min_item=0)
        assert s.counts["read"] == {"users": 815, "items": items, "events": 84_440}
        copies = [s.test.target[k] in s.item[s.test.start[k]:s.test.stop[k]] for k in range(len(s.test))]
        missing = users - len(s.test)                  # a buy that nothing precedes is no case
        assert np.sum(copies) / (len(s.test) + missing) == pytest.approx(share, abs=.002)


@pytest.mark.parametrize("name", ["beauty", "retail_beh"])
def test_loading_needs_no_cache(name, shared_data):
    started = time.perf_counter()
    load(name)
    assert time.perf_counter() - started < 5
