"""Generated ids: a bijection, the same in each process, made from texts alone; and what happens where a file does not fit."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest

from mbnb import datasets, zoo
from mbnb.checks import random_items
from mbnb.doctor.data import bijection
from mbnb.events import DataError
from mbnb.ids import IdTable, kmeans, lexical, make_ids, read_ids, read_lexical, rqkmeans, semantic_table
from mbnb.items import Items, Table

MAKERS = ("rqkmeans", "rqvae", "lexical")


@pytest.fixture(scope="module")
def shop():
    return datasets.load("toyshop-tiny")


@pytest.fixture(scope="module")
def made(shop):
    "The three ways to make ids, once each, by texts that need no package."
    return {how: datasets.load_items("toyshop-tiny", shop, {"ids": how}, encoder="tfidf")["ids"] for how in MAKERS}


def spelled(table):
    return [table.spelled(v) for v in range(1, len(table.tokens))]


def test_id_table_hash(made):
    "Another process, with another seed of Python's own hashes, makes the very same ids."
    code = f"""
from mbnb import datasets
for how in {MAKERS}:
    print(datasets.load_items("toyshop-tiny", datasets.load("toyshop-tiny"), {{"ids": how}}, encoder="tfidf")["ids"].hash)"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == [made[how].hash for how in MAKERS]


@pytest.mark.parametrize("how", MAKERS)
def test_every_id_leads_back_to_its_item(made, shop, how):
    t = made[how]
    assert len(t.lookup) == shop.n_items and t.items == tuple(map(str, shop.items))
    for v in range(1, shop.n_items + 1):
        assert t.lookup[tuple(int(x) for x in t.tokens[v] if x)] == v
    begun = {own[:k] for own in spelled(t) for k in range(1, len(own))}
    assert not begun & set(spelled(t))
    assert bijection(t.tokens[1:]).severity == "ok"


@pytest.mark.parametrize("how", ["rqkmeans", "rqvae"])
def test_level_offsets(made, how):
    "No token stands for two levels, and the words say the level."
    t = made[how]
    size = int(t.source.split("levels of ")[1].split()[0])
    by_level = [set(t.tokens[1:, level]) for level in range(t.length)]
    assert sum(map(len, by_level)) == len(set().union(*by_level))
    for level in range(3):
        assert min(by_level[level]) >= 1 + size * level and max(by_level[level]) < 1 + size * (level + 1)
        assert all(t.words[x] == f"{'abc'[level]}{x - 1 - size * level}" for x in by_level[level])


def test_seeds_differ_and_alike_items_begin_alike(shop):
    items = datasets.load_items("toyshop-tiny", shop, {"text": "needed"}, encoder="tfidf")
    x, has = items["text"].values, items["text"].has
    t = rqkmeans(x, has)
    assert t.hash == rqkmeans(x, has, seed=0).hash != rqkmeans(x, has, seed=1).hash
    same = t.tokens[1:, 0][:, None] == t.tokens[1:, 0]
    np.fill_diagonal(same, False)
    cosine = x[1:] @ x[1:].T
    assert cosine[same].mean() > 1.5 * cosine.mean()


def test_the_same_text_twice_gets_two_ids():
    texts = ["", "red polish", "red polish", "red polish", "nail file", "", ""]
    x = np.array([[0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 0], [0, 0]], np.float32)
    has = np.array([t != "" for t in texts])
    for t in (rqkmeans(x, has), lexical(texts, x, has)):
        assert len(set(spelled(t))) == 6
        assert len({own[:-1] for own in spelled(t)[:3]}) == 1
        assert "3 items" in t.source and "2 items without" in t.source


def test_items_without_a_text_share_no_token_with_others():
    "But for the last level, that of numbers."
    rng = np.random.default_rng(0)
    x, has = rng.standard_normal((31, 4)).astype(np.float32), np.append(False, rng.random(30) < 0.7)
    t = rqkmeans(np.where(has[:, None], x, 0), has)
    known, unknown = set(t.tokens[has][:, :3].ravel()), set(t.tokens[1:][~has[1:]][:, :3].ravel())
    assert not known & unknown and len(set(spelled(t))) == 30


def test_no_texts_at_all():
    x, has = np.zeros((4, 2), np.float32), np.zeros(4, bool)
    assert len(set(spelled(rqkmeans(x, has)))) == 3 and len(set(spelled(lexical([""] * 4, x, has)))) == 3


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_lexical_ids_are_no_beginnings_of_one_another(levels):
    "Random texts of a few words, many of them alike: the check of IdTable passes whatever the depth."
    rng = np.random.default_rng(levels)
    texts = ["", *(" ".join(rng.choice(["a", "b", "c", "d"], rng.integers(1, 4))) for _ in range(80))]
    x = rng.standard_normal((81, 3)).astype(np.float32)
    t = lexical(texts, x, np.arange(81) > 0, branching=5, levels=levels)
    assert len(t.lookup) == 80 and t.length <= levels + 2
    for own in spelled(t):
        words = [w for w in own if w[0] != "#"]
        assert len(words) == len(set(words))


def test_kmeans_finds_what_is_there():
    rng = np.random.default_rng(1)
    centers = rng.standard_normal((12, 6)) * 8
    x = np.repeat(centers, 30, 0) + rng.standard_normal((360, 6)) * 0.1
    found, code = kmeans(x, 12, seed=5)
    assert sorted(Counter(code.tolist()).values()) == [30] * 12
    for c in range(12):
        assert np.allclose(found[c], x[code == c].mean(0), atol=1e-4)


def test_errors_name_the_first_two_items():
    good = semantic_table(np.array([[0, 0], [0, 1], [1, 0]]), np.ones(3, bool), (2, 2), "made up", ("", "x", "y", "z"))
    with pytest.raises(DataError, match=r"items 'x' and 'z' share the id a0 b0 \(1 such collisions among 3 items\).*add a last piece"):
        replace(good, tokens=np.vstack([good.tokens[:3], good.tokens[1:2]]))
    with pytest.raises(DataError, match="beginning of the other"):
        replace(good, tokens=np.array([[0, 0], [1, 3], [1, 0], [2, 3]]))
    with pytest.raises(DataError, match="item 'y' has no id"):
        replace(good, tokens=np.array([[0, 0], [1, 3], [0, 0], [2, 3]]))
    with pytest.raises(DataError, match="tokens run from 0 to 9; expected 0 to 4"):
        replace(good, tokens=np.array([[0, 0], [1, 3], [9, 3], [2, 3]]))
    with pytest.raises(DataError, match="a 0 in its middle"):
        replace(good, tokens=np.array([[0, 0, 0], [1, 0, 3], [1, 4, 0], [2, 3, 0]]))
    with pytest.raises(DataError, match="different words"):
        replace(good, words=("", "a", "a", "b", "c"))


def test_a_stored_table_is_the_same_and_an_edited_one_is_refused(made, tmp_path):
    for how, t in made.items():
        t.save(tmp_path / f"{how}.npz")
        again = IdTable.load(tmp_path / f"{how}.npz")
        assert (again.hash, again.words, again.source, again.items) == (t.hash, t.words, t.source, t.items)
    with np.load(tmp_path / "rqkmeans.npz") as z:
        parts = dict(z)
    parts["tokens"] = parts["tokens"][[0, 2, 1, *range(3, len(parts["tokens"]))]]
    np.savez(tmp_path / "edited.npz", **parts)
    with pytest.raises(DataError, match="the file was changed"):
        IdTable.load(tmp_path / "edited.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "rqkmeans.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="no table of ids"):
        IdTable.load(tmp_path / "cut.npz")


def test_ids_of_a_file(shop, made, tmp_path):
    "Every kind of file, with its items in another order."
    t, order = made["lexical"], np.random.default_rng(0).permutation(np.arange(1, 101))
    own = {str(shop.items[v]): t.spelled(v) for v in order}
    (tmp_path / "a.txt").write_text("".join(f"{k} |{'|'.join(v)}\n" for k, v in own.items()))
    (tmp_path / "a.json").write_text(json.dumps(own))
    (tmp_path / "a.tsv").write_text("item\tn\tid\n" + "".join(f"{k}\t1\t{'|'.join(v)}\n" for k, v in own.items()))
    replace(t, tokens=t.tokens[np.append(0, order)], items=("", *own)).save(tmp_path / "a.npz")
    for name in ("a.txt", "a.json", "a.tsv:id", "a.npz"):
        found = datasets.load_items("toyshop-tiny", shop, {"ids": "rqkmeans"}, ids=str(tmp_path / name))
        assert spelled(found["ids"]) == spelled(t), name
        assert "text" not in found
    with pytest.raises(DataError, match=r"no column ''; write FILE:COLUMN with one of n, id"):
        read_ids(tmp_path / "a.tsv", shop.items)
    with pytest.raises(DataError, match="no column 'ids'"):
        datasets.load_items("toyshop-tiny", shop, {"ids": "rqkmeans"}, ids=f"{tmp_path}/a.tsv:ids")["ids"]


def test_ids_of_another_catalogue_are_refused(shop, made, tmp_path):
    t = made["rqkmeans"]
    replace(t, items=("", *(f"item:{i}" for i in shop.items[1:]))).save(tmp_path / "other.npz")
    with pytest.raises(DataError, match=r"ids for 0 of 100 items; 100 match if keys lose their first 5 characters"):
        read_ids(tmp_path / "other.npz", shop.items)
    replace(t, items=("", *(f"#{n}" for n in range(100)))).save(tmp_path / "other.npz")
    with pytest.raises(DataError, match="the keys look like '#0', the items like .*: ids of another catalogue"):
        read_ids(tmp_path / "other.npz", shop.items)
    small = datasets.load_items("toyshop-tiny", shop, {"ids": "rqkmeans"}, encoder="tfidf")["ids"]
    keep = np.array([0, *range(1, 40), *range(41, 101)])
    replace(small, tokens=small.tokens[keep], items=tuple(np.array(small.items)[keep])).save(tmp_path / "less.npz")
    with pytest.raises(DataError, match=rf"no id for item '{shop.items[40]}' \(1 of 100 items"):
        read_ids(tmp_path / "less.npz", shop.items)


def test_lines_that_are_no_ids(tmp_path):
    (tmp_path / "a.txt").write_text("B1 |a|b\nB2\n")
    with pytest.raises(DataError, match="line 2 is 'B2'"):
        read_lexical(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("B1 |a|b\nB1 |c\n")
    with pytest.raises(DataError, match="'B1' stands there twice"):
        read_lexical(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("B1 |a||b\n")
    with pytest.raises(DataError, match="an empty piece"):
        read_lexical(tmp_path / "a.txt")


def test_D06_fires_on_a_colliding_table():
    codes = np.array([[1, 2], [1, 3], [1, 2], [2, 2]])
    card = bijection(codes)
    assert card.severity == "E" and "2 of 4 items share a generated id" in card.message
    with pytest.raises(DataError, match="items 1 and 3 share"):
        semantic_table(codes, np.ones(4, bool), (4, 4), "made up")


def test_texts_dealt_out_anew_give_their_ids_to_other_items(shop):
    "The control: the same ids, on other items; and texts, vectors and ids move together."
    both = ({}, {"shuffled": "text"})
    plain, mixed = (datasets.load_items("toyshop-tiny", shop, {"ids": "lexical"}, encoder="tfidf", **more) for more in both)
    assert mixed.texts() != plain.texts() and sorted(mixed.texts()) == sorted(plain.texts())
    at = [plain.texts().index(t) for t in mixed.texts()]
    assert np.array_equal(mixed["text"].values, plain["text"].values[at])
    assert mixed["ids"].hash != plain["ids"].hash and "SHUFFLED" in mixed["ids"].source
    for v in range(1, 101):
        assert {w for w in mixed["ids"].spelled(v)[-1:] if w[0] != "#"} <= set(mixed.texts()[v].lower().replace(",", "").split())
    dealt = datasets.load_items("toyshop-tiny", shop, {"ids": "lexical"}, encoder="tfidf", shuffled="ids")["ids"]
    assert sorted(map(tuple, dealt.tokens.tolist())) == sorted(map(tuple, plain["ids"].tokens.tolist())) and dealt.hash != plain["ids"].hash
    with pytest.raises(DataError, match="data.shuffled=image"):
        datasets.load_items("toyshop-tiny", shop, {"ids": "lexical"}, shuffled="image")


def test_graph_and_similar_items(shop, tmp_path):
    "Vectors come from the folder of a run or a file, neighbors as numbers of items."
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100, 8)).astype(np.float32)
    np.savez(tmp_path / "item_vectors.npz", item=shop.items[1:].astype(str), vector=vectors)
    (tmp_path / "near.json").write_text(json.dumps({str(shop.items[v]): [str(shop.items[v % 100 + 1]), "nobody"] for v in range(1, 100)}))
    given = {"graph": str(tmp_path), "similar": str(tmp_path / "near.json")}
    found = datasets.load_items("toyshop-tiny", shop, {"graph": "needed", "similar": "optional"}, **given)
    assert np.allclose(found["graph"].values[1:], vectors) and found.widths() == {"graph_dim": 8, "similar_dim": 1}
    assert found["similar"].values[:, 0].tolist() == [0, *range(2, 101), 0] and not found["similar"].has[100]
    mixed = datasets.load_items("toyshop-tiny", shop, {"graph": "needed"}, graph=str(tmp_path), shuffled="graph")["graph"]
    assert not np.array_equal(mixed.values, found["graph"].values)
    assert np.allclose(np.sort(mixed.values, 0), np.sort(found["graph"].values, 0))
    assert "similar" not in datasets.load_items("toyshop-tiny", shop, {"similar": "optional"})
    with pytest.raises(DataError, match="data.graph=RUN FOLDER"):
        datasets.load_items("toyshop-tiny", shop, {"graph": "needed"})
    with pytest.raises(DataError, match="does not read the table 'graph'"):
        datasets.load_items("toyshop-tiny", shop, {"ids": "rqkmeans"}, graph=str(tmp_path))
    with pytest.raises(DataError, match="does not read the table 'ids'"):
        datasets.load_items("toyshop-tiny", shop, {"text": "needed"}, ids="rqkmeans")


def test_made_up_items_have_ids_and_graph():
    made = random_items(40)
    assert made["ids"].length == 3 and made["ids"].hash == random_items(40)["ids"].hash != random_items(40, seed=1)["ids"].hash
    assert made["graph"].values.shape == (41, 8) and 0 < (~made["graph"].has[1:]).sum() < 10
    assert len(made.texts()) == 41 and made.texts()[0] == "" and all(made.texts()[1:])
    assert made["similar"].values.shape == (41, 3) and random_items(5)["ids"].length == 3


def test_words_of_a_vector_table_are_not_there():
    only = Items(["", "a"], [], {"text": Table("text", ["a"], np.ones((1, 3), np.float32), "made up")})
    with pytest.raises(DataError, match="only their vectors"):
        only.texts()
    with pytest.raises(DataError, match="valid: rqkmeans, rqvae, lexical, FILE or FILE:COLUMN"):
        make_ids("kmeans", only)


@pytest.fixture
def speller(monkeypatch):
    "A model that reads ids and does nothing with them."
    from mbnb.models import sasrec

    @dataclass(frozen=True)
    class Config(sasrec.Config):
        n_tokens: int = 0
        id_length: int = 0

    class Speller(sasrec.SASRec):
        sides = {"ids": "rqkmeans"}

        def prepare(self, sequences, items):
            assert (items["ids"].n_tokens, items["ids"].length) == (self.config.n_tokens, self.config.id_length)

    Speller.Config = Config
    module = ModuleType("speller")
    module.Speller = Speller
    monkeypatch.setitem(sys.modules, "speller", module)
    monkeypatch.setitem(zoo.MODELS, "speller", "speller:Speller")


def test_a_run_keeps_its_ids(speller, tmp_path):
    from mbnb.experiment import RunError, configure, run_experiment

    with pytest.raises(zoo.ConfigError, match="'n_tokens'"):
        configure(model="speller", dataset="toyshop-tiny", set="model.n_tokens=5")
    common = dict(model="speller", dataset="toyshop-tiny", max_len=20, epochs=1, runs_dir=str(tmp_path), preset="small")
    said = []
    run_experiment(configure(**common, run_name="one", set="data.encoder=tfidf model.d_model=16"), say=said.append)
    kept = IdTable.load(tmp_path / "one" / "ids.npz")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["items"]["ids"].endswith(kept.hash) and any(line.startswith("ids: rqkmeans") for line in said)
    assert config["config"]["model"]["n_tokens"] == kept.n_tokens
    cards = json.loads((tmp_path / "one" / "doctor.json").read_text())
    assert "100 items, as many ids" in json.dumps(cards)
    # the ids of one run serve another
    run_experiment(configure(**common, run_name="two", doctor="off", set=f"data.ids={tmp_path}/one model.d_model=16"), say=said.append)
    again = IdTable.load(tmp_path / "two" / "ids.npz")
    assert again.hash == kept.hash and again.source.startswith("one: rqkmeans")
    # weights of one do not serve a model that spells otherwise
    with pytest.raises(RunError, match=f"one was trained with other ids .{kept.hash}.*data.ids=.*/one"):
        run_experiment(configure(**common, fork="one", doctor="off", set="data.ids=lexical data.encoder=tfidf model.d_model=16"))
