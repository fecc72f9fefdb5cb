"""F45 hostile archives and F46 bad downloads: miniature archives, served on this machine.

Each archive has the inner paths and the quirks of the real one. No test needs a network."""
import gzip
import hashlib
import http.server
import io
import os
import stat
import struct
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from mbnb import datasets
from mbnb.datasets import Source, check_answer, data_file, fetch, get, load, locate, spec, unpack
from mbnb.events import DataError


def sha(body):
    return "sha256:" + hashlib.sha256(body).hexdigest()


def ratings(line, users=4, films=6):
    "Rating lines of `users` x `films`, times rising."
    pairs = [(u, i) for u in range(1, users + 1) for i in range(1, films + 1)]
    return "".join(line.format(u=u, i=i, r=1 + (u + i) % 5, t=978_300_000 + 100 * u + i) for u, i in pairs)


def zipped(**files):
    "Bytes of a zip archive; keys use `|` for a slash."
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in files.items():
            z.writestr(name.replace("|", "/"), text)
    return body.getvalue()


def tarred(files=(), entries=()):
    "Bytes of a tar.gz archive: `files` are (name, bytes), `entries` ready-made TarInfo."
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as t:
        for name, text in files:
            info = tarfile.TarInfo(name)
            info.size = len(text)
            t.addfile(info, io.BytesIO(text))
        for info in entries:
            t.addfile(info)
    return body.getvalue()


def kuairand_log():
    header = ("user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
              "is_profile_enter,tab\n")
    line = "{u},{i},20220408,1200,{t},1,{like},0,0,0,0,1,900,0,1\n"
    pairs = [(u, i) for u in range(6) for i in range(6)]
    return header + "".join(line.format(u=u, i=i, t=1_649_390_000_000 + 1000 * (10 * u + i), like=i % 2) for u, i in pairs)


LOGS = [f"KuaiRand-Pure/data/log_standard_{days}_pure.csv" for days in ("4_08_to_4_21", "4_22_to_5_08")]
MINIATURES = {   # name -> bytes of its archive
    "ml-1m": zipped(**{"ml-1m|ratings.dat": ratings("{u}::{i}::{r}::{t}\n"), "ml-1m|README": "terms",
                       "ml-1m|movies.dat": "1::Am\u00e9lie::Comedy\n".encode("latin-1")}),
    "ml-latest-small": zipped(**{"ml-latest-small|ratings.csv": "userId,movieId,rating,timestamp\n" + ratings("{u},{i},{r}.5,{t}\n"),
                                 "ml-latest-small|README.txt": "terms"}),
    "ml-100k-site": zipped(**{"ml-100k|u.data": ratings("{u}\t{i}\t{r}\t{t}\n"), "ml-100k|u.item": "1|Caf\u00e9".encode("latin-1"),
                              "ml-100k|README": "terms"}),
    "kuairand-pure": tarred([(name, kuairand_log().encode()) for name in LOGS] + [("KuaiRand-Pure/data/user_features.csv", b"user_id\n")]),
}


class Site:
    "A server on 127.0.0.1: `answers` holds a list of answers per path, the last one repeats; `asked` counts."
    def __init__(self):
        site = self
        self.answers, self.asked = {}, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                queue = site.answers.get(self.path)
                site.asked.append(self.path)
                answer = (queue.pop(0) if len(queue) > 1 else queue[0]) if queue else (404, "text/plain", b"none", None)
                status, kind, body, announce = answer
                self.send_response(status)
                self.send_header("content-type", kind)
                if announce != "hidden":
                    self.send_header("content-length", str(announce or len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, path, body, status=200, kind="application/zip", announce=None):
        self.answers.setdefault(path, []).append((status, kind, body, announce))
        return self.url + path


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache; no other place holds data sets."
    monkeypatch.setenv("MBNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MBNB_DATA", raising=False)
    monkeypatch.setattr(datasets, "project_folder", lambda: None)
    monkeypatch.setattr("pooch.core.time.sleep", lambda s: None)      # retries without the wait
    return tmp_path / "cache"


def served(site, name, body, **change):
    "The row `name` with its archive served by `site`."
    s = spec(name)
    url = site.put("/" + s.source.url.rsplit("/", 1)[1], body)
    return replace(s, source=replace(s.source, **({"url": url, "hash": sha(body), "limit": 10**6} | change)))


def refused(call, *args, contains, **kwargs):
    "`call` ends with one line that holds every text of `contains`."
    with pytest.raises(DataError) as e:
        call(*args, **kwargs)
    line = str(e.value)
    assert "\n" not in line and len(line) < 1200, line
    for text in contains:
        assert text in line, line


def leftovers(folder):
    "Files below `folder`, by name."
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


# ---- F46: downloads

@pytest.mark.parametrize("name", MINIATURES)
def test_ok(name, site, cache):
    s = served(site, name, MINIATURES[name])
    folder = get(s)
    assert folder == cache / s.folder == locate(s)
    assert sorted(p.name for p in folder.iterdir()) == sorted([datasets.SUMS, *s.files])
    built = load(s, **({"min_user": 2, "min_item": 2} if name == "kuairand-pure" else {}))
    assert built.name == s.name and len(built.test) >= 4
    assert built.unit == s.time
    assert get(s) == folder and len(site.asked) == 1              # the second time nothing is fetched
    assert not list((cache / "archives").iterdir())


def test_kuairand_rows(site, cache):
    "One event a behavior that is set, weak to strong, the rows of an impression in one group."
    s = served(site, "kuairand-pure", MINIATURES["kuairand-pure"])
    get(s)
    built = load(s, min_user=0, min_item=0)
    assert {built.behaviors[b] for b in built.behavior} == {"click", "long_view", "like"}
    one = built.item[built.offsets[0]:built.offsets[1]]
    assert len(one) == 2 * (6 * 2 + 3) and built.first.sum() == 36      # both logs hold the same impressions


def test_rating_derived_says_so(site, cache):
    s = served(site, "ml-latest-small", MINIATURES["ml-latest-small"])
    get(s)
    built = load(s, ratings=True)
    assert built.name == "ml-latest-small-rating-derived" and built.behaviors == ("", "dislike", "neutral", "like")
    assert load(s).behaviors == ("", "interact")


def test_wrong_checksum(site, cache):
    s = served(site, "ml-1m", MINIATURES["ml-1m"], hash=sha(b"something else"))
    refused(get, s, contains=["ml-1m.zip", "another checksum", "3 tries", "nothing kept"])
    assert len(site.asked) == 3 and leftovers(cache) == []


def test_md5_where_only_that_is_known(site, cache):
    body = MINIATURES["ml-1m"]
    assert get(served(site, "ml-1m", body, hash="md5:" + hashlib.md5(body).hexdigest()))
    refused(get, served(site, "ml-100k-site", body, hash="md5:" + "0" * 32), contains=["another checksum"])


def test_no_checksum_no_download(site, cache):
    refused(get, served(site, "ml-1m", MINIATURES["ml-1m"], hash=""), contains=["no checksum"])
    assert site.asked == []


def test_truncated_body(site, cache):
    body = MINIATURES["ml-1m"]
    s = served(site, "ml-1m", body)
    site.answers["/ml-1m.zip"] = [(200, "application/zip", body[:100], len(body))]
    refused(get, s, contains=["ml-1m.zip", "3 tries", "nothing kept"])
    assert leftovers(cache) == []


def test_truncated_without_a_length(site, cache):
    "Without a content-length only the checksum can tell."
    body = MINIATURES["ml-1m"]
    s = served(site, "ml-1m", body)
    site.answers["/ml-1m.zip"] = [(200, "application/zip", body[:100], "hidden")]
    refused(get, s, contains=["another checksum"])
    assert leftovers(cache) == []


def test_second_try_succeeds(site, cache):
    body = MINIATURES["ml-1m"]
    s = served(site, "ml-1m", body)
    site.answers["/ml-1m.zip"] = [(200, "application/zip", body[:100], len(body)), (503, "text/plain", b"busy", None),
                                  (200, "application/zip", body, None)]
    assert get(s) and len(site.asked) == 3


def test_404_is_not_tried_again(site, cache):
    s = served(site, "ml-1m", MINIATURES["ml-1m"], url=site.url + "/gone.zip")
    refused(get, s, contains=["gone.zip", "404"])
    assert site.asked == ["/gone.zip"] and leftovers(cache) == []


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/zip"])
def test_page_instead_of_file(kind, site, cache):
    page = b"\n <!DOCTYPE html><html>the site is being repaired</html>"
    s = served(site, "ml-1m", MINIATURES["ml-1m"])
    site.answers["/ml-1m.zip"] = [(200, kind, page, None)]
    s = replace(s, source=replace(s.source, hash=sha(page)))           # refused even with the page's own checksum
    refused(get, s, contains=["ml-1m.zip", "page", "browser"])
    assert leftovers(cache) == []


@pytest.mark.parametrize("announce", [None, "hidden"])
def test_too_large(announce, site, cache):
    s = served(site, "ml-1m", MINIATURES["ml-1m"], limit=1000)
    site.answers["/ml-1m.zip"] = [(200, "application/zip", bytes(200_000), announce)]
    refused(get, s, contains=["ml-1m.zip", "1,000"])
    assert leftovers(cache) == []


def test_https_only(tmp_path):
    refused(fetch, "http://example.org/a.zip", sha(b""), tmp_path / "a.zip", 99, contains=["http://example.org/a.zip", "https"])
    refused(fetch, "file:///etc/hostname", sha(b""), tmp_path / "a.zip", 99, contains=["https"])

    class Answer:
        url, history, status_code, headers = "http://example.org/a.zip", (), 200, {}
    refused(check_answer, "https://example.org/a.zip", Answer, 99, contains=["https"])                 # redirected to http


def test_no_server(site, cache):
    s = served(site, "ml-1m", MINIATURES["ml-1m"])
    site.server.shutdown()
    site.server.server_close()
    refused(get, s, contains=["ml-1m.zip", "ConnectionError", "try again later"])
    assert leftovers(cache) == []


def test_cache_cannot_be_poisoned(site, cache):
    body = MINIATURES["ml-1m"]
    s = served(site, "ml-1m", body)
    (cache / "archives").mkdir(parents=True)
    (cache / "archives" / "ml-1m.zip").write_bytes(b"planted")          # is replaced: its checksum is wrong
    get(s)
    assert "1::1::" in (cache / "ml-1m" / "ratings.dat").read_text()
    with open(cache / "ml-1m" / "ratings.dat", "a") as f:
        f.write("9::9::5::978300000\n")                                # is noticed: it is not what was unpacked
    refused(load, s, contains=["ml-1m", "ratings.dat", "expected", "remove it"])


def test_killed_while_moving(site, cache, monkeypatch):
    "The process dies between two files of a set: the set counts as absent, and the next `get` completes it."
    s = served(site, "kuairand-pure", MINIATURES["kuairand-pure"])
    real, moved = os.replace, []

    def dies(a, b):
        if Path(b).parent == cache / s.folder:
            moved.append(b)
            if len(moved) == 3:
                raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr(datasets.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        get(s)
    monkeypatch.setattr(datasets.os, "replace", real)
    assert locate(s) is None
    assert get(s) == locate(s) and not list(cache.glob(".unpack-*"))


# ---- F46: sets that a person fetches

def test_manual_absent(cache, capsys):
    refused(get, "taobao-full", contains=["taobao-full", "https://tianchi.aliyun.com/dataset/649", "UserBehavior.csv", "MBNB_DATA",
                                          str(cache / "taobao-full")])
    refused(load, "retailrocket", contains=["retailrocket", "kaggle.com", "events.csv"])


def test_manual_present(cache):
    folder = cache / "taobao-full"
    folder.mkdir(parents=True)
    lines = [f"{u},{i},{i % 3},{'buy' if i % 2 else 'pv'},{1_511_600_000 + 60 * i}\n" for u in range(5) for i in range(8)]
    (folder / "UserBehavior.csv").write_text("".join(lines))
    assert get("taobao-full") == folder
    built = load("taobao-full")
    assert built.unit == "s" and len(built.test) == 5 and built.behaviors[built.target_behaviors[0]] == "buy"


def test_manual_present_but_another_file(cache):
    folder = cache / "retailrocket"
    folder.mkdir(parents=True)
    (folder / "events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n1433221332117,1,view,2,\n")
    refused(load, "retailrocket", contains=["events.csv", "md5", "fddaf7c1c6a9df23a726500a08ffdd7e"])


# ---- ml-100k out of a wheel

def wheel(tmp_path, body):
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    path.write_bytes(zipped(**{"recbole|__init__.py": "raise SystemExit('run')", "recbole|dataset_example|ml-100k|ml-100k.inter": body}))
    return path


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ratings("{u}\t{i}\t{r}\t{t}\n")


@pytest.fixture
def no_recbole(monkeypatch):
    monkeypatch.setattr(datasets, "installed_member", lambda member: None)


def test_wheel(cache, tmp_path, monkeypatch, no_recbole):
    asked = []
    monkeypatch.setattr(datasets, "pip_download", lambda requirement, folder: asked.append(requirement) or wheel(tmp_path, INTER))
    monkeypatch.setitem(datasets.TABLE, "ml-100k", replace(spec("ml-100k"), files={"ml-100k.inter": sha(INTER.encode())}))
    for _ in range(2):
        built = load("ml-100k")
    assert asked == ["recbole==1.2.1"] and built.name == "ml-100k" and built.n_items == 6


def test_wheel_with_another_file(cache, tmp_path, monkeypatch, no_recbole):
    monkeypatch.setattr(datasets, "pip_download", lambda requirement, folder: wheel(tmp_path, INTER))
    monkeypatch.setitem(datasets.TABLE, "ml-100k", replace(spec("ml-100k"), twin=""))
    refused(load, "ml-100k", contains=["ml-100k.inter", "expected 4edb74e2"])
    assert leftovers(cache) == []


def test_installed_recbole_serves_and_is_not_run(cache, tmp_path, monkeypatch):
    zipfile.ZipFile(wheel(tmp_path, INTER)).extractall(tmp_path / "site")                   # our own archive
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(datasets.TABLE, "ml-100k", replace(spec("ml-100k"), files={"ml-100k.inter": sha(INTER.encode())}))
    monkeypatch.setattr(datasets, "pip_download", lambda *a: pytest.fail("pip was asked"))
    assert load("ml-100k").n_items == 6


def test_neither_pip_nor_site(cache, site, monkeypatch, no_recbole):
    def offline(requirement, folder):
        raise DataError(f"pip download {requirement} failed: no network")
    monkeypatch.setattr(datasets, "pip_download", offline)
    monkeypatch.setitem(datasets.TABLE, "ml-100k-site", served(site, "ml-100k-site", b"", url=site.url + "/gone.zip", hash=sha(b"x")))
    refused(load, "ml-100k", contains=["ml-100k", "MBNB_DATA", "no network", "404"])


def test_site_takes_over_under_its_own_name(cache, site, monkeypatch, no_recbole):
    def offline(requirement, folder):
        raise DataError("offline")
    monkeypatch.setattr(datasets, "pip_download", offline)
    twin = served(site, "ml-100k-site", MINIATURES["ml-100k-site"])
    monkeypatch.setitem(datasets.TABLE, "ml-100k-site", twin)
    other = load("ml-100k")
    assert other.name == "ml-100k-site"
    monkeypatch.setitem(datasets.TABLE, "ml-100k", replace(spec("ml-100k"), split_hash=other.split_hash))
    assert load("ml-100k").name == "ml-100k"                        # the same split may carry the name


def test_pip_says_why(tmp_path):
    refused(datasets.pip_download, "mbnb-no-such-requirement @ file:///nowhere/x.whl", tmp_path, contains=["pip download", "failed"])


# ---- F45: hostile archives

def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link():
    body, info = io.BytesIO(), zipfile.ZipInfo("log/events.csv")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(body, "w") as z:
        z.writestr(info, "/etc/passwd")
    return body.getvalue()


def lying_zip():
    "Announces 10 bytes, holds 2 MB."
    body = bytearray(zipped(**{"log|events.csv": bytes(2_000_000)}))
    at = body.index(b"PK\x01\x02")
    body[at + 24:at + 28] = struct.pack("<I", 10)
    body[22:26] = struct.pack("<I", 10)
    return bytes(body)


OK = {"log|events.csv": "user,item\n1,2\n"}
HOSTILE = {
    "zip dotdot": (zipped(**OK, **{"..|..|escaped": "!"}), "leaves the folder"),
    "zip dotdot inside": (zipped(**OK, **{"log|..|..|..|escaped": "!"}), "leaves the folder"),
    "zip backslash": (zipped(**OK, **{"..\\..\\escaped": "!"}), "leaves the folder"),
    "zip absolute": (zipped(**OK, **{"|tmp|escaped": "!"}), "absolute path"),
    "zip drive": (zipped(**OK, **{"C:|escaped": "!"}), "absolute path"),
    "zip link": (zip_link(), "link"),
    "zip bomb": (zipped(**{"log|events.csv": bytes(5_000_000)}), "unfolds into more"),
    "zip bomb elsewhere": (zipped(**OK, **{"log|other.bin": bytes(5_000_000)}), "unfolds into more"),
    "zip lies about its size": (lying_zip(), "damaged"),
    "tar dotdot": (tarred([("log/events.csv", b"1\n"), ("../../escaped", b"!")]), "leaves the folder"),
    "tar absolute": (tarred([("/tmp/escaped", b"!"), ("log/events.csv", b"1\n")]), "absolute path"),
    "tar symlink": (tarred([("log/events.csv", b"1\n")], [link("log/x", "/etc/passwd")]), "link"),
    "tar symlink under the wanted name": (tarred(entries=[link("log/events.csv", "/etc/passwd")]), "link"),
    "tar hard link": (tarred([("log/a", b"1\n")], [link("log/events.csv", "log/a", tarfile.LNKTYPE)]), "link"),
    "tar device": (tarred(entries=[link("log/events.csv", "", tarfile.FIFOTYPE)]), "link or device"),
    "tar bomb": (tarred([("log/events.csv", bytes(5_000_000))]), "unfolds into more"),
    "member missing": (zipped(**{"log|clicks.csv": "1"}), "'log/events.csv' is not inside"),
    "cut zip": (zipped(**OK)[:-10], "damaged or not"),
    "cut tar": (tarred([("log/events.csv", os.urandom(5000))])[:-2000], "damaged or not"),
    "damaged zip body": (zipped(**OK).replace(b"PK\x03\x04", b"PK\x03\x04", 1)[:45] + b"\xff\xff" + zipped(**OK)[47:], "damaged or not"),
    "no archive": (b"hello, I am a text file", "damaged or not"),
    "empty": (b"", "damaged or not"),
    "gzip of no tar": (gzip.compress(b"hello" * 100), "damaged or not"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(case, tmp_path):
    body, says = HOSTILE[case]
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    (inside / "archive").write_bytes(body)
    refused(unpack, inside / "archive", ["log/events.csv"], inside / "out", contains=["archive", says])
    assert leftovers(tmp_path) == ["a/b/c/archive"] and not Path("/tmp/escaped").exists()


def test_hostile_download_leaves_no_set(site, cache):
    body = zipped(**{"ml-1m|ratings.dat": ratings("{u}::{i}::{r}::{t}\n"), "..|..|escaped": "!"})
    s = served(site, "ml-1m", body)
    refused(get, s, contains=["'../../escaped'"])
    assert locate(s) is None and not (cache / "ml-1m").exists()


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    "A directory link first, then a file through it: the classic way out."
    body = tarred(entries=[link("log", str(tmp_path / "outside"))], files=[("log/events.csv", b"1\n")])
    (tmp_path / "outside").mkdir()
    (tmp_path / "t.tar.gz").write_bytes(body)
    refused(unpack, tmp_path / "t.tar.gz", ["log/events.csv"], tmp_path / "out", contains=["link"])
    assert leftovers(tmp_path) == ["t.tar.gz"]


def test_side_file_is_checked(cache, monkeypatch, tmp_path):
    folder = tmp_path / "own" / "retail_beh"
    folder.mkdir(parents=True)
    for file in (*spec("retail_beh").files, *spec("retail_beh").extra):
        (folder / file).write_text("planted")
    monkeypatch.setenv("MBNB_DATA", str(tmp_path / "own"))
    refused(data_file, "retail_beh", "candidates101.txt", contains=["candidates101.txt", "expected e26bcbb1"])


def test_source_is_a_row_not_code():
    "Every automatic download has https, a checksum, a limit and a member for each file."
    for s in datasets.TABLE.values():
        if not (s.source and s.source.url):
            continue
        assert isinstance(s.source, Source) and s.source.url.startswith("https://") and s.source.limit > 0
        assert s.source.hash.partition(":")[0] in ("sha256", "md5")
        assert [m.rsplit("/", 1)[1] for m in s.source.members] == list(s.files)
