"""Side tables: what a file says, what a model is handed, and what happens where the keys do not fit."""

import json

import numpy as np
import pytest

from mbnb import datasets, items
from mbnb.checks import random_items
from mbnb.doctor.data import coverage
from mbnb.events import DataError
from mbnb.items import Items, Table, encode, rows_of, side_of


@pytest.fixture(scope="module")
def shop():
    return datasets.load("toyshop-tiny")


def test_image_vectors_come_in_by_a_file(shop, tmp_path):
    "Generated vectors, in another order than the items and for nine items in ten, land in the rows of their items."
    rng = np.random.default_rng(0)
    keys = rng.permutation(shop.items[1:])[:90]
    np.savez(tmp_path / "clip.npz", item=keys.astype(str), vector=rng.standard_normal((90, 8)))
    found = datasets.load_items("toyshop-tiny", shop, {"image": "needed"}, image=str(tmp_path / "clip.npz"))["image"]
    assert found.values.shape == (101, 8) and found.has.sum() == 90 and not found.has[0]
    given = dict(zip(keys, np.load(tmp_path / "clip.npz")["vector"]))
    for v in np.flatnonzero(found.has):
        assert np.allclose(found.values[v], given[shop.items[v]], atol=1e-6)
    assert not found.values[~found.has].any()


def test_a_table_that_fits_nothing_stops_with_the_nearest_spelling(shop, tmp_path):
    (tmp_path / "text.json").write_text(json.dumps({f"{i} lamp": "a lamp" for i in shop.items[1:]}))
    with pytest.raises(DataError, match="0 of 100 items found; 100 match if keys end at the first blank"):
        datasets.load_items("toyshop-tiny", shop, {"text": "needed"}, text=str(tmp_path / "text.json"))["text"]


@pytest.mark.parametrize(("known", "severity"), [(100, "ok"), (97, "I"), (90, "W"), (40, "E")])
def test_coverage_is_graded(shop, known, severity):
    assert coverage(shop.items[1 : 1 + known], shop.items[1:], "text").severity == severity


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".npz", ".json"])
def test_every_kind_of_file_gives_the_same_vectors(tmp_path, suffix):
    import polars as pl

    keys, x = ["a", "b", "c"], np.arange(6, dtype=np.float32).reshape(3, 2) + 0.5
    frame, path = pl.DataFrame({"item": keys, "x": x[:, 0], "y": x[:, 1]}), tmp_path / f"v{suffix}"
    if suffix == ".npz":
        np.savez(path, item=keys, vector=x)
    elif suffix == ".json":
        path.write_text(json.dumps({k: v.tolist() for k, v in zip(keys, x)}))
    elif suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="," if suffix == ".csv" else "\t")
    table = items.read_table(path, "image")
    assert table.keys == keys and np.array_equal(table.values, x)


def test_encoders_know_what_is_alike():
    texts = ["red nail polish", "dark red nail lacquer polish", "garden hose with steel nozzle"]
    for name in ("tfidf", "wordllama") if items.has_wordllama() else ("tfidf",):
        x, made = encode(texts, name)
        assert made == name and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
        assert x[0] @ x[1] > x[0] @ x[2]


def test_wordllama_reads_its_own_files_only(monkeypatch):
    pytest.importorskip("wordllama", reason="the extra `text` is not installed")
    import socket

    def refuse(*a, **k):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert items.encode_wordllama(["a lamp"]).shape == (1, 256)


def test_made_up_items_leave_gaps():
    made = random_items(40)
    widths = {"text_dim": 16, "attributes_dim": 12, "image_dim": 10, "user_text_dim": 16, "graph_dim": 8, "similar_dim": 3}
    assert made.widths() == widths | {"n_tokens": 13, "id_length": 3}
    assert 0 < (~made["text"].has).sum() < 10


def test_users_have_no_pad_row():
    both = Items(["", "i1"], ["u1", "u2"], {"user_text": Table("user_text", ["u2"], np.ones((1, 3), np.float32), "made up")})
    assert both["user_text"].has.tolist() == [False, True] and both.keys() == {}


def test_unknown_names_are_refused(shop):
    with pytest.raises(DataError, match="nearest: text"):
        datasets.load_items("toyshop-tiny", shop, {"text": "needed"}, texts="x.json")
    with pytest.raises(DataError, match="data.image=FILE"):
        datasets.load_items("toyshop-tiny", shop, {"image": "needed"})


def test_empty_texts_are_missing_ones():
    side = side_of(Table("text", ["a", "b"], ["a lamp", " "], "made up"), ["", "a", "b"], "tfidf")
    assert side.has.tolist() == [False, True, False]
    assert rows_of(Table("text", ["a"], ["x"], "made up"), ["b", "a"]).tolist() == [-1, 0]


@pytest.mark.parametrize(("known", "severity"), [(90, "W"), (100, "ok")])
def test_preflight_says_how_much_a_file_knows(shop, tmp_path, known, severity):
    from mbnb.experiment import configure, look_before

    (tmp_path / "text.json").write_text(json.dumps({i: f"a lamp {i}" for i in shop.items[1 : 1 + known]}))
    small = f"model.d_model=16 model.width=16 model.n_positions=2 model.n_neg=5 data.text={tmp_path}/text.json data.encoder=tfidf"
    cards = look_before(configure(model="ur4rec", dataset="toyshop-tiny", max_len=20, set=small))
    mine = [c for c in cards if c.id == "D04" and c.message.startswith("text")]
    assert [c.severity for c in mine] == [severity], cards
