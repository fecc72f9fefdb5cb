"""The readers on real logs: the counts that the notes of the data sets state. Skipped, with the reason, where the sets are absent."""
import hashlib

import polars as pl
import pytest

from mbnb.events import DataError, canonical, read_events, read_lists, read_user_lists

pytestmark = pytest.mark.real_data
CODES = {"2": "view", "1": "cart", "0": "buy", "3": "unknown"}
SHA256 = {
    "taobao/interactions.parquet": "b64f0cb9cf560b729526470886ddd203128ea4f52d44f39821da03f1f5160b4b",
    "kuairand/interactions.parquet": "d5217f6dfbf69d5ee8f019790228ff641e5ff89955b0ab54a4303b820603d2f2",
    "beauty/Beauty.txt": "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
    "beauty/user_sequence.txt": "47197cbee7bdc1896926e10d96b807dce0aecb9a1f0c2ccc887c21090237c9b7",
    "retail_beh/retail_beh.train.inter": "783198a969e4b2b2286bd71e3fbcac3b425e003ddcd81b0799ee49e378fdd307",
    "retail_beh/retail_beh.test.inter": "e92878cdf42394e647d30cf14a50d68158a04309e46d697d1d14ae184e2432aa"}


def counts(x, *names): return tuple(x.counts[n] for n in names)


@pytest.mark.parametrize("name", SHA256)
def test_files_are_the_ones_that_were_counted(shared_data, name):
    assert hashlib.sha256((shared_data / name).read_bytes()).hexdigest() == SHA256[name]


def test_taobao(shared_data):
    events = read_events(shared_data / "taobao" / "interactions.parquet")
    assert counts(events, "rows", "bad_rows", "duplicates", "users", "items") == (84_440, 0, 0, 815, 55_344)
    assert events.counts["behaviors"] == {"pv": 75_837, "cart": 4_497, "fav": 2_356, "buy": 1_750}
    assert events.unit == "s" and events.frame.schema["timestamp"] == pl.Int64            # floats in the file
    stamps = pl.read_parquet(shared_data / "taobao" / "interactions.parquet")["timestamp"]
    assert stamps.dtype == pl.Float64 and (events.frame["timestamp"].cast(pl.Float64) == stamps).all()
    assert counts(events, "first_time", "last_time") == (1_511_539_217, 1_512_316_763)     # 2017-11-24 16:00:17 .. 2017-12-03 15:59:23 UTC
    users = events.frame.group_by("user").len()["len"]
    assert (users.min(), users.median(), users.max()) == (3, 78, 539)


def test_taobao_category_as_item(shared_data):
    events = read_events(shared_data / "taobao" / "interactions.parquet", columns={"item": "category_id"})
    assert counts(events, "rows", "users", "items") == (84_440, 815, 2_913)


def test_taobao_no_two_consecutive_events_on_one_item(shared_data):
    frame = canonical(read_events(shared_data / "taobao" / "interactions.parquet"))
    assert not ((frame["item"] == frame["item"].shift()) & (frame["user"] == frame["user"].shift())).any()


def test_kuairand(shared_data):
    events = read_events(shared_data / "kuairand" / "interactions.parquet")
    assert counts(events, "rows", "bad_rows", "users", "items", "duplicates") == (92_734, 0, 664, 9_359, 203)
    assert events.counts["behaviors"] == {"like": 33_745, "click": 27_484, "long_view": 19_320, "hate": 8_083, "profile": 2_214,
                                          "comment": 1_258, "forward": 326, "follow": 304}
    assert events.unit == "ms"
    assert events.frame.select("user", "item", "timestamp").n_unique() == 41_704
    assert events.frame.select("user", "timestamp").n_unique() == 37_067
    assert len(read_events(shared_data / "kuairand" / "interactions.parquet", duplicates="drop")) == 92_734 - 203


def test_beauty(shared_data):
    ids, words = read_user_lists(shared_data / "beauty" / "Beauty.txt"), read_user_lists(shared_data / "beauty" / "user_sequence.txt")
    for events in (ids, words):
        assert counts(events, "lines", "users", "items", "events") == (22_363, 22_363, 12_101, 198_502) and events.unit == "order"
    lengths = ids.frame.group_by("user").len()["len"]
    assert (lengths.min(), lengths.max()) == (5, 204)
    assert ids.frame.select("user", "item").n_unique() == 198_502                         # no user has an item twice
    pairs = pl.DataFrame({"id": ids.frame["item"], "asin": words.frame["item"]}).unique()
    assert len(pairs) == 12_101                                                           # one to one, row by row
    assert ids.frame["item"].unique(maintain_order=True).to_list() == [str(k) for k in range(1, 12_102)]


def test_retail_beh(shared_data):
    files = (shared_data / "retail_beh" / f"retail_beh.{part}.inter" for part in ("train", "test"))
    train, test = (read_lists(file, target_behavior="buy", behavior_names=CODES) for file in files)
    assert counts(train, "rows", "bad_rows") == (30_690, 0) and counts(test, "rows", "bad_rows") == (2_000, 0)
    assert train.counts["behaviors"] == {"view": 331_227, "cart": 97_022, "buy": 48_184, "unknown": 6_708}
    assert test.counts["behaviors"] == {"view": 6_424, "cart": 1_989}
    assert train.counts["list_events"] + test.counts["list_events"] == 491_554
    for lists, mean, longest in ((train, 15.74, 199), (test, 4.21, 93)):
        n = lists.frame["items"].list.len()
        assert (round(n.mean(), 2), n.median(), n.max()) == (mean, 2, longest)
        assert (n == lists.frame["behaviors"].list.len()).all()
    items = pl.concat([x for p in (train, test) for x in (p.frame["items"].explode(), p.frame["target"])])
    assert items.n_unique() == 31_239 and items.cast(pl.Int64).min() == 1 and items.cast(pl.Int64).max() == 36_224
    inside = test.frame.select(pl.col("items").list.contains(pl.col("target"))).to_series()
    assert (~inside).sum() == 14


def test_retail_beh_needs_every_code_named(shared_data):
    with pytest.raises(DataError, match="behavior '3' has no name"):
        read_lists(shared_data / "retail_beh" / "retail_beh.train.inter", target_behavior="buy",
                   behavior_names={k: CODES[k] for k in "210"})
