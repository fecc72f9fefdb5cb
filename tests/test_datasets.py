"""The table of data sets, where files are looked for, options, files of the reader's own."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mbnb import datasets, toyshop
from mbnb.datasets import TABLE, data_file, describe, how_to_get, load, locate, names, overview, places, spec
from mbnb.events import DataError

CONTRACT = {   # name -> (target, seen filter, protocols, time)
    "toyshop": ("next event", "none", ("full",), "s"),
    "toyshop-tiny": ("next event", "none", ("full",), "s"),
    "toyshop-small": ("next event", "none", ("full",), "s"),
    "toyshop-large": ("next event", "none", ("full",), "s"),
    "ml-100k": ("next event", "all_seen", ("full", "full/none", "uni99"), "s"),
    "ml-100k-site": ("next event", "all_seen", ("full", "full/none", "uni99"), "s"),
    "beauty": ("next event", "all_seen", ("full", "full/none"), "order"),
    "retail_beh": ("buy (given)", "none", ("full", "fixed100"), "order"),
    "taobao": ("buy", "none", ("full", "uni99"), "s"),
    "taobao-category": ("buy", "none", ("full", "uni99"), "s"),
    "kuairand": ("like", "none", ("full", "uni99"), "ms"),
    "kuairand-impression": ("like", "none", ("full", "uni99"), "ms"),
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "No place holds a data set."
    monkeypatch.setenv("MBNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MBNB_DATA", raising=False)
    monkeypatch.setattr(datasets, "project_folder", lambda: None)
    return tmp_path


def says(call, *args, contains, **kwargs):
    with pytest.raises(DataError) as e:
        call(*args, **kwargs)
    line = str(e.value)
    assert "\n" not in line
    for text in contains:
        assert text in line, line


@pytest.mark.parametrize("name", CONTRACT)
def test_defaults(name):
    s = spec(name)
    assert (s.target, s.seen_filter, s.protocols, s.time) == CONTRACT[name]


@pytest.mark.parametrize("name", names())
def test_row_is_complete(name):
    s = TABLE[name]
    assert s.name == name and s.title and s.terms and s.reader in datasets.READERS
    assert set(s.build) <= datasets.build_options(s).keys(), "an argument that the split does not know"
    assert set(s.read) <= datasets.read_options(s).keys() | set(datasets.inspect.signature(datasets.READERS[s.reader]).parameters)
    assert s.target in ("next event", *s.build.get("behaviors", ()), "buy (given)")
    assert all(len(h) in (0, 64) or h.startswith("md5:") for h in (s.files | s.extra).values())
    assert s.reader == "shop" or (s.files and s.source and s.source.page)
    assert not s.candidates or s.candidates in s.extra
    assert all(k.split(".")[0] in ("model", "loss", "fit", "data", "eval") for k in s.advice)
    assert s.name in describe(name) and s.terms in describe(name)


def test_overview():
    table = overview()
    assert list(table.index) == list(names()) and not table.isna().any().any()


# ---- places

def test_order_of_places(nowhere, monkeypatch):
    own, project = nowhere / "own", nowhere / "work" / "checkout"
    own.mkdir()
    monkeypatch.setenv("MBNB_DATA", str(own))
    monkeypatch.setattr(datasets, "project_folder", lambda: project)
    assert places() == [own, nowhere / "work" / "shared" / "data", nowhere / "cache"]
    for p in reversed(places()):
        (p / "beauty").mkdir(parents=True)
        (p / "beauty" / "Beauty.txt").write_text("1 2 3\n")
        assert locate("beauty") == p / "beauty"


def test_half_a_set_is_absent(nowhere):
    folder = nowhere / "cache" / "retail_beh"
    folder.mkdir(parents=True)
    (folder / "retail_beh.train.inter").write_text("")
    assert locate("retail_beh") is None
    says(load, "retail_beh", contains=["retail_beh.test.inter", "MBNB_DATA"])


def test_variable_that_names_no_folder(nowhere, monkeypatch):
    monkeypatch.setenv("MBNB_DATA", str(nowhere / "typo"))
    says(load, "beauty", contains=["MBNB_DATA", "typo", "no folder"])


@pytest.mark.parametrize("name", [n for n in names() if TABLE[n].files and not TABLE[n].source.pip])
def test_absent_is_one_line(name, nowhere):
    s = spec(name)
    says(load, name, contains=[name, s.title, next(iter(s.files)), how_to_get(name), "MBNB_DATA", f"{s.folder}/"])


def test_wrong_checksum_of_own_file(nowhere, monkeypatch):
    (nowhere / "beauty").mkdir()
    (nowhere / "beauty" / "Beauty.txt").write_text("1 2 3 4\n")
    monkeypatch.setenv("MBNB_DATA", str(nowhere))
    says(load, "beauty", contains=["beauty", "Beauty.txt", "expected 226cce9c"])
    says(data_file, "beauty", "beauty_item_table.tsv", contains=["beauty_item_table.tsv", "missing"])


def test_no_traceback_for_a_person(tmp_path):
    "A fresh process, an empty cache: the message alone tells what to do."
    code = "from mbnb import datasets\nfrom mbnb.events import MbnbError\ndatasets.project_folder = lambda: None\n" \
           "try: datasets.load('taobao')\nexcept MbnbError as e: raise SystemExit(str(e))"
    env = {k: v for k, v in os.environ.items() if k != "MBNB_DATA"} | {"MBNB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "taobao" in done.stderr


# ---- names and options

def test_unknown_name():
    says(load, "kuairnd", contains=["'kuairnd'", "nearest name: kuairand;", "retail_beh"])


def test_unknown_option(nowhere):
    says(load, "toyshop-tiny", behaviour_effect=0, contains=["toyshop-tiny", "'behaviour_effect'", "nearest: behavior_effect;"])
    says(load, "toyshop-tiny", sep=",", contains=["'sep'", "valid: "])


def test_ratings_only_where_there_are_some():
    says(load, "toyshop-tiny", ratings=True, contains=["toyshop-tiny", "ml-100k"])


# ---- the shop

def test_shop_is_the_same_everywhere():
    here = load("toyshop-tiny")
    code = "from mbnb.datasets import load; print(load('toyshop-tiny').data_hash)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == here.data_hash
    assert replace(here, name="x").split_hash == load("toyshop-tiny").split_hash != load("toyshop-tiny", seed=5).split_hash


def test_toyshop_is_the_small_one():
    assert load("toyshop").data_hash == load("toyshop-small").data_hash
    assert len(load("toyshop").users) == toyshop.SIZES["small"].n_users


# ---- files of the reader's own

def log(path, sep=",", users=6, events=8, header="user_id,item_id,behavior,timestamp"):
    lines = [f"{u},{(u * k) % 5},{'buy' if k % 2 else 'view'},{1_600_000_000 + 60 * k}" for u in range(users) for k in range(events)]
    Path(path).write_text("\n".join([header, *lines]).replace(",", sep) + "\n")
    return path


@pytest.mark.parametrize("name,sep", [("a.csv", ","), ("a.tsv", "\t")])
def test_own_file(name, sep, tmp_path):
    built = load(log(tmp_path / name, sep), columns={"user": "user_id", "item": "item_id"}, target="buy", min_item=1)
    assert built.name == "a" and len(built.test) == 6 and built.unit == "s"
    assert built.split["target"] == "buy" and set(built.counts["sha256"]) == {name}


def test_own_file_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "deeper").mkdir()
    log(tmp_path / "deeper" / "a.csv", header="user,item,behavior,timestamp")
    monkeypatch.chdir(tmp_path)
    whole = load(tmp_path / "deeper" / "a.csv").data_hash
    assert [load(path).data_hash for path in ("deeper/a.csv", "./deeper/a.csv", "deeper")] == [whole] * 3
    assert "file a.csv" in describe("deeper/a.csv") and str(tmp_path / "deeper") in describe("deeper/a.csv")


def test_behaviors_that_are_coded_by_numbers(tmp_path):
    path = log(tmp_path / "a.csv", header="user,item,behavior,timestamp")
    path.write_text(path.read_text().replace("view", "1").replace("buy", "2"))
    from mbnb.experiment import configure, data_of
    for given in ("data.target=2 data.behaviors=[1,2]", "data.target='2' data.behaviors=('1','2')"):
        built = data_of(configure(dataset=str(path), set=given))
        assert built.behaviors == ("", "1", "2") and built.target_behaviors == (2,)
    says(configure, dataset=str(path), set="data.behaviors=1", contains=["a: data.behaviors=1: expected a list of names"])
    says(load, path, users="all", contains=["a: data.users='all': expected a whole number"])
    says(load, "toyshop", size="huge", contains=["data.size='huge' is unknown; valid: tiny"])


def test_own_folder(tmp_path):
    log(tmp_path / "events.csv")
    (tmp_path / "README.md").write_text("notes")
    built = load(str(tmp_path), columns={"user": "user_id", "item": "item_id"})
    assert built.name == tmp_path.name
    log(tmp_path / "more.csv")
    says(load, tmp_path, contains=["events.csv, more.csv", "name the file"])


def test_own_list_rows(tmp_path):
    header = "session_id:token\titem_id_list:token_seq\titem_type_list:token_seq\titem_id:token\n"
    rows = [f"{k}\ti{k} i{k + 1}\t2 1\ti{k}\n" for k in range(40)]
    (tmp_path / "x.train.inter").write_text(header + "".join(rows))
    (tmp_path / "x.test.inter").write_text(header + "".join(rows[:4]))
    says(load, tmp_path, contains=[tmp_path.name, "-p set data.target_behavior=buy"])
    built = load(tmp_path, target_behavior="buy")
    assert built.split["kind"] == "given" and len(built.train) + len(built.valid) == 40
    (tmp_path / "x.valid.inter").write_text(header + "".join(rows[:3]))
    built = load(tmp_path, target_behavior="buy")
    assert built.split["valid"] == "file" and [len(built.cases(split)) for split in ("train", "valid", "test")] == [40, 3, 4]


def test_own_file_that_is_not_there(tmp_path):
    says(load, tmp_path / "no.csv", contains=["no.csv", "no file or folder"])
