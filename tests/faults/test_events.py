"""Faults of data files (the F numbers of the fault catalog): one clear message, nothing guessed, nothing half written."""
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

import mbnb.events
from mbnb.events import GEAR_LOG, DataError, canonical, from_frame, read_events, read_lists, read_user_lists
from mbnb.events import _fast, _open_text, _read_rows, _walk
from mbnb.sequences import from_events

HEAD = "user,item,behavior,timestamp\n"
T0 = 1_511_539_217


def log(path, text, head=HEAD, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else (head + text).encode(encoding))
    return path


def rows(n, bad=()):
    "n good rows, some replaced: {row: text}."
    bad = dict(bad)
    return "".join(bad.get(k, f"u{k % 97},i{k % 89},view,{T0 + k}") + "\n" for k in range(n))


def typed(path, times, dtype=None, user=None):
    "A parquet file with these times."
    n = len(times)
    times = pl.Series(times, dtype=dtype)
    pl.DataFrame({"user": user or ["u"] * n, "item": ["i"] * n, "behavior": ["view"] * n, "timestamp": times}).write_parquet(path)
    return path


def message(call, *args, **kwargs):
    with pytest.raises(DataError) as e: call(*args, **kwargs)
    assert "Traceback" not in str(e.value)
    return str(e.value)


# ---- F29 empty file, header only ----

@pytest.mark.parametrize("name,text,said", [
    ("a.csv", b"", "0 bytes"), ("a.csv", HEAD.encode(), "no rows"), ("a.csv", HEAD.encode() + b"\n\n", "no rows"),
    ("a.csv", HEAD.encode().rstrip(b"\n"), "no rows"), ("a.inter", b"user_id:token\titem_id:token\n", "no rows"),
    ("a.csv", b"\n\n", "line 1 is blank"), ("a.csv", b"\xef\xbb\xbf", "line 1 is blank"),
    ("a.parquet", b"", "0 bytes"), ("a.parquet", b"no parquet at all", "cannot be read as parquet")])
def test_f29_empty_file(tmp_path, name, text, said):
    start = time.perf_counter()
    text = message(read_events, log(tmp_path / name, text), behavior=None)
    assert name in text and said in text
    assert time.perf_counter() - start < 1


def test_f29_other_readers_and_missing_files(tmp_path):
    assert "0 bytes" in message(read_user_lists, log(tmp_path / "a.txt", b""))
    assert "0 bytes" in message(read_lists, log(tmp_path / "a.inter", b""), target_behavior="buy")
    assert "no such file" in message(read_events, tmp_path / "none.csv")
    assert "is a folder" in message(read_events, tmp_path)
    pl.DataFrame(schema={"user": pl.String, "item": pl.String, "behavior": pl.String}).write_parquet(tmp_path / "e.parquet")
    assert "no rows" in message(read_events, tmp_path / "e.parquet")


# ---- F30 wrong delimiter, missing column ----

def test_f30_wrong_delimiter(tmp_path):
    text = message(read_events, log(tmp_path / "a.csv", (HEAD + rows(3)).replace(",", ";").encode()))
    assert "a.csv" in text and "found 1 column" in text and "pass sep=';'" in text
    assert len(read_events(tmp_path / "a.csv", sep=";")) == 3
    assert "does not tell the format" in message(read_events, log(tmp_path / "a.log", rows(3)))


def test_f30_missing_column_lists_found_and_needed_and_suggests(tmp_path):
    path = log(tmp_path / "a.csv", "1,2,view,3\n", head="uid,productId,action,ts\n")
    text = message(read_events, path)
    assert "'uid', 'productId', 'action', 'ts'" in text and "needed: user, item, behavior, timestamp" in text
    assert 'columns={"user": "uid", "item": "productId", "behavior": "action", "timestamp": "ts"}' in text
    assert "nearest: 'uid'" in message(read_events, path, columns={"user": "uidd"})
    assert "'usr', which is no part of an event" in message(read_events, path, columns={"usr": "uid"})


def test_f30_nothing_is_passed_over_in_silence(tmp_path):
    assert '"timestamp": "ts"' in message(read_events, log(tmp_path / "a.csv", "1,2,3\n", head="user,item,ts\n"), behavior="view")
    assert 'behavior="view"' in message(read_events, log(tmp_path / "b.csv", "1,2\n", head="user,item\n"))
    assert "leave behavior out" in message(read_events, log(tmp_path / "c.csv", rows(2)), behavior="view")
    assert "occurs 2 times" in message(read_events, log(tmp_path / "d.csv", "1,2,3\n", head="user,item,item\n"), behavior="view")
    ordered = read_events(tmp_path / "a.csv", behavior="view", columns={"timestamp": None})
    assert (ordered.unit, ordered.counts["unit_from"]) == ("order", "file order")


def test_f30_column_named_row_is_an_ordinary_column(tmp_path):
    path = log(tmp_path / "a.csv", "u,7,view,5\nu,8,view,6\n", head="user,row,behavior,time\n")
    assert read_events(path, columns={"item": "row"}).frame.select("item", "row").rows() == [("7", 0), ("8", 1)]


# ---- F31 encoding, byte order mark, CR LF, NUL ----

def test_f31_latin1_byte_is_named_and_the_hint_works(tmp_path):
    path = log(tmp_path / "a.csv", rows(3, {1: f"u,café,view,{T0}"}), encoding="latin-1")
    at = path.read_bytes().index(b"\xe9")
    text = message(read_events, path)
    assert "line 3 (row 1, byte" in text and f"byte 0xe9 at byte {at} is not UTF-8" in text and 'encoding="latin-1"' in text
    assert read_events(path, encoding="latin-1").frame["item"][1] == "café"


def test_f31_offsets_are_those_of_the_file_in_its_own_encoding(tmp_path):
    path = log(tmp_path / "a.csv", f"é,é,view,{T0}\né,,view,{T0}\n", encoding="latin-1")
    at = path.read_bytes().rindex(b"\xe9,,view")
    assert f"line 3 (row 1, byte {at}), column item" in message(read_events, path, encoding="latin-1")
    path = log(tmp_path / "b.dat", b"1::2::view::9\n1::::view::9\n")
    assert "line 2 (row 1, byte 14), column item" in message(read_events, path, sep="::", names=["user", "item", "behavior", "timestamp"])


def test_f31_bom_and_crlf_are_accepted(tmp_path):
    plain = read_events(log(tmp_path / "a.csv", rows(5)))
    for name, data in (("b.csv", b"\xef\xbb\xbf" + (HEAD + rows(5)).encode()), ("c.csv", (HEAD + rows(5)).replace("\n", "\r\n").encode()),
                       ("d.csv", (HEAD + rows(5)).rstrip("\n").encode()), ("e.csv", (HEAD + rows(5) + "\n\n").encode())):
        assert read_events(log(tmp_path / name, data)).frame.equals(plain.frame), name
    headless = read_events(log(tmp_path / "f.csv", b"\xef\xbb\xbf" + rows(5).encode()), names=HEAD.strip().split(","))
    assert headless.frame.equals(plain.frame)


def test_f31_utf16_and_old_line_ends(tmp_path):
    path = log(tmp_path / "a.csv", rows(3), encoding="utf-16")
    assert 'encoding="utf-16"' in message(read_events, path)
    assert len(read_events(path, encoding="utf-16")) == 3
    assert "CR alone" in message(read_events, log(tmp_path / "b.csv", (HEAD + rows(3)).replace("\n", "\r").encode()))
    assert "encoding='utf-9' is unknown" in message(read_events, path, encoding="utf-9")


def test_f31_nul_is_refused(tmp_path):
    path = log(tmp_path / "a.csv", rows(3, {2: f"u,i\0,view,{T0}"}))
    text = message(read_events, path)
    assert "line 4 (row 2" in text and f"NUL byte (byte {path.read_bytes().index(0)})" in text
    assert "NUL" in message(read_user_lists, log(tmp_path / "b.txt", b"1 2\0 3\n"))


# ---- F32 ragged rows ----

def test_f32_short_and_long_rows_are_named(tmp_path):
    text = message(read_events, log(tmp_path / "a.csv", rows(200, {3: "u,i,view", 9: f"u,i,view,{T0},1"})))
    for said in ("2 of 200 rows are bad", "line 5 (row 3", "short row: 3 fields, expected 4", "line 11 (row 9", "long row: 5 fields"):
        assert said in text


def test_f32_a_short_and_a_long_row_do_not_make_up_for_each_other(tmp_path):
    path = log(tmp_path / "a.csv", f"u,i,view,{T0},more\nu,i,view,{T0},x,y\nu,i,view,{T0}\n", head=HEAD.strip() + ",note\n")
    assert "2 of 3 rows are bad" in message(read_events, path)


def test_f32_first_five_are_named_and_all_are_counted(tmp_path):
    text = message(read_events, log(tmp_path / "a.csv", rows(100, dict.fromkeys(range(10, 18), "u"))))
    assert "8 of 100 rows" in text and text.count("short row") == 5 and "and 3 more" in text


def test_f32_quarantine(tmp_path):
    bad = {3: "u,i,view", 500: f",i,view,{T0}", 700: "u,=cmd(),view,never"}
    path, to = log(tmp_path / "a.csv", rows(1000, bad)), tmp_path / "out" / "bad_rows.csv"
    events = read_events(path, on_bad_rows="quarantine", bad_rows_to=to)
    assert len(events) == 997 and events.counts["bad_rows"] == 3 and events.counts["rows"] == 1000
    assert set(range(1000)) - set(events.frame["row"]) == set(bad)
    told = pl.read_csv(to, infer_schema=False)
    assert told["row"].to_list() == ["3", "500", "700"] and told["line"].to_list() == ["5", "502", "702"]
    data = path.read_bytes()
    for byte, text in zip(told["byte"], bad.values()): assert data[int(byte):].startswith(text.encode() + b"\n")
    assert told["text"].to_list() == list(bad.values())
    assert [p.name for p in to.parent.iterdir()] == ["bad_rows.csv"]


def test_f32_quarantine_has_a_limit_and_leaves_nothing_behind(tmp_path):
    path, to = log(tmp_path / "a.csv", rows(100, dict.fromkeys((1, 2), "u"))), tmp_path / "bad_rows.csv"
    assert "2.0%, and quarantine takes at most 1%" in message(read_events, path, on_bad_rows="quarantine", bad_rows_to=to)
    assert not to.exists()
    assert "bad_rows_to" in message(read_events, path, on_bad_rows="quarantine")
    assert "'error', 'quarantine'" in message(read_events, path, on_bad_rows="skip")


def test_f32_quarantine_never_overwrites_another_file(tmp_path):
    path = log(tmp_path / "a.csv", rows(100, {1: "u"}))
    before = path.read_bytes()
    assert "would be overwritten" in message(read_events, path, on_bad_rows="quarantine", bad_rows_to=path)
    assert path.read_bytes() == before


def test_f32_lists_and_one_line_a_user(tmp_path):
    head = "session_id:token\titem_id_list:token_seq\titem_type_list:token_seq\titem_id:token\n"
    path = log(tmp_path / "a.inter", "1\t5 6\t2\t7\n2\t5\t2\n3\t5  6\t2 2\t7\n4\t5\t2\t \n", head=head)
    text = message(read_lists, path, target_behavior="buy")
    for part in ("4 of 4", "2 items, 1 behaviors", "short row", "two blanks in a row", "column target"): assert part in text
    path = log(tmp_path / "b.inter", "1\t2\n", head="user_id:token\titem_id:token\n")
    assert "no column 'item_id_list'" in message(read_lists, path, target_behavior="buy")
    text = message(read_user_lists, log(tmp_path / "c.txt", b"1 2 3\n2\n1 4\n"))
    assert "line 2 (row 1, byte 6)" in text and "has no items" in text and "an earlier line" in text


def test_f32_an_open_quote_swallows_nothing(tmp_path):
    text = message(read_events, log(tmp_path / "a.csv", rows(3000, {5: f'u,"i,view,{T0}'})))
    assert "1 of 3,000 rows is bad" in text and "line 7 (row 5" in text and "quotes" in text
    text = message(read_events, log(tmp_path / "b.csv", rows(3000, {5: f'u,"i,view,{T0}', 9: f'"u","i",view,{T0}'})))
    assert "1 of 3,000 rows is bad" in text and "line 7 (row 5" in text                     # it does not close in row 9


# ---- F33 odd ids ----

ODD = ["007", "7", "7.0", "NA", "null", "NaN", "None", "nan", "-", "0", "True", "1e5",
       "\u043a\u043b\u044e\u0447", "\u540d\u524d", "\u00e9", "e\u0301", "a b", "#1", "x" * 100_000]


@pytest.mark.parametrize("suffix,sep", [(".csv", ","), (".tsv", "\t"), (".inter", "\t"), (".parquet", None)])
def test_f33_ids_are_opaque(tmp_path, suffix, sep):
    path = tmp_path / f"a{suffix}"
    frame = pl.DataFrame({"user": ODD, "item": ODD[::-1], "behavior": ["NA"] * len(ODD), "timestamp": range(T0, T0 + len(ODD))})
    frame.write_csv(path, separator=sep) if sep else frame.write_parquet(path)
    found = read_events(path).frame
    assert found["user"].to_list() == ODD and found["item"].to_list() == ODD[::-1] and set(found["behavior"]) == {"NA"}


def test_f33_user_lists_and_list_rows_too(tmp_path):
    odd = [i for i in ODD if " " not in i]
    assert read_user_lists(log(tmp_path / "a.txt", ("007 " + " ".join(odd) + "\n").encode())).frame["item"].to_list() == odd
    head = "item_id_list\titem_type_list\titem_id\n"
    lists = read_lists(log(tmp_path / "a.inter", f"{' '.join(odd)}\t{' '.join(odd)}\tNA\n", head=head), target_behavior="buy")
    assert lists.frame["items"][0].to_list() == odd and lists.frame["target"][0] == "NA"


@pytest.mark.parametrize("blank", ["", " ", "\u3000", '""'])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_f33_blank_ids_are_refused(tmp_path, blank, column):
    fields = ["u", "i", "view", str(T0)]
    fields[column] = blank
    text = message(read_events, log(tmp_path / "a.csv", rows(2) + ",".join(fields) + "\n"))
    assert "line 4 (row 2, byte" in text and f"column {['user', 'item', 'behavior'][column]}" in text and "blank id" in text


def test_f33_long_id_is_cut_in_the_message(tmp_path):
    assert len(message(read_events, log(tmp_path / "a.csv", "u,i,view," + "x" * 100_000 + "\n"))) < 1000


def test_f33_quoted_ids(tmp_path):
    path = log(tmp_path / "a.csv", f'"a,b","say ""hi""",view,{T0}\n"c\nd",5" disc,view,{T0}\n')
    assert read_events(path).frame.select("user", "item").rows() == [("a,b", 'say "hi"'), ("c\nd", '5" disc')]
    path = log(tmp_path / "b.tsv", f'"a"\ti\tview\t{T0}\n', head=HEAD.replace(",", "\t"))
    assert "quote='\"'" in message(read_events, path)
    assert read_events(path, quote='"').frame["user"][0] == "a" and read_events(path, quote="").frame["user"][0] == '"a"'


# ---- F34 huge and negative ids ----

def test_f34_huge_and_negative_ids(tmp_path):
    huge = [str(x) for x in (2**63 - 1, 2**63, 2**64, 10**40, -1, -2**63)]
    path = log(tmp_path / "a.csv", "".join(f"{u},{u},view,{T0}\n" for u in huge))
    assert read_events(path).frame["user"].to_list() == huge
    users = pl.Series([2**64 - 1, 0], dtype=pl.UInt64)
    frame = pl.DataFrame({"user": users, "item": [-5, 2**62], "behavior": ["v", "v"], "timestamp": [T0, T0]})
    frame.write_parquet(tmp_path / "b.parquet")
    assert read_events(tmp_path / "b.parquet").frame.select("user", "item").rows() == [(str(2**64 - 1), "-5"), ("0", str(2**62))]


def test_f34_float_ids_are_refused(tmp_path):
    text = message(read_events, typed(tmp_path / "a.parquet", [T0, T0], user=[7.0, None]))
    assert "a.parquet" in text and "column user is of type Float64" in text and "integers or text" in text


# ---- F35 exact duplicates ----

def test_f35_duplicates_are_counted_and_dropped_on_request(tmp_path):
    path = log(tmp_path / "a.csv", rows(100) + rows(5) + f"u0,i0,buy,{T0}\n")
    kept, dropped = read_events(path), read_events(path, duplicates="drop")
    assert (len(kept), kept.counts["duplicates"], kept.counts["duplicates_dropped"]) == (106, 5, 0)
    assert (len(dropped), dropped.counts["duplicates"], dropped.counts["duplicates_dropped"]) == (101, 5, 5)
    assert dropped.frame["row"].to_list() == [*range(100), 105]
    assert "'keep', 'drop'" in message(read_events, path, duplicates="maybe")


# ---- F36 unsorted file ----

def test_f36_shuffled_file_same_canonical_frame(tmp_path):
    lines = rows(500).splitlines(keepends=True)
    mixed = random.Random(0).sample(lines, len(lines))
    a, b = read_events(log(tmp_path / "a.csv", "".join(lines))), read_events(log(tmp_path / "b.csv", "".join(mixed)))
    assert not a.frame.equals(b.frame) and b.frame["row"].to_list() == list(range(500))
    assert canonical(a).equals(canonical(b))


def test_f36_ties_stay_in_file_order(tmp_path):
    path = log(tmp_path / "a.csv", f"u,b,view,{T0}\nu,a,view,{T0}\nu,c,view,{T0 - 1}\n")
    assert canonical(read_events(path))["item"].to_list() == ["c", "b", "a"]


# ---- F38 small time steps ----

def test_f38_seconds_stay_apart(tmp_path):
    times = [1_400_000_000 + k for k in range(200)]
    assert len(set(np.float32(times))) < 5                                   # what float32 would make of them
    for kind in ("{}", "{}.0"):
        events = read_events(log(tmp_path / "a.csv", "".join(f"u,i{k},view,{kind.format(t)}\n" for k, t in enumerate(times))))
        assert events.frame.schema["timestamp"] == pl.Int64 and events.frame["timestamp"].to_list() == times
        assert canonical(events)["item"].to_list() == [f"i{k}" for k in range(200)]
    for kind in (pl.Float64, pl.Int64, pl.UInt32):
        assert read_events(typed(tmp_path / "a.parquet", times, kind)).frame["timestamp"].to_list() == times


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.000+00:00"])
def test_iso_dates_of_a_text_file(tmp_path, form):
    dated = lambda k: f"u{k % 97},i{k % 89},view,{time.strftime(form, time.gmtime(T0 + k))}"
    events = read_events(log(tmp_path / "a.csv", rows(50, {k: dated(k) for k in range(50)})))
    assert events.unit == "ms" and events.frame["timestamp"].to_list() == [(T0 + k) * 1000 for k in range(50)]
    text = message(read_events, log(tmp_path / "a.csv", rows(50, {k: dated(k) for k in range(49)})))
    for part in ("1 of 50 rows is bad", "line 51 (row 49", f"'{T0 + 49}'", "ISO date"): assert part in text


# ---- F39 bad times ----

@pytest.mark.parametrize("bad,said", [
    (str(T0 * 1000), "looks like milliseconds, while most rows are seconds"), (str(T0 * 10**6), "looks like microseconds"),
    ("9999999999", "in the future"), ("-5", "negative"), ("0", "looks like a small number"),
    *((x, "not a whole number") for x in ("NaN", "", "inf", f"{T0}.5", "2017-11-25 00:00", str(2**63)))])
def test_f39_bad_times_are_named(tmp_path, bad, said):
    text = message(read_events, log(tmp_path / "a.csv", rows(50, {7: f"u,i,view,{bad}"})))
    for part in ("a.csv: 1 of 50 rows is bad", "line 9 (row 7", "column timestamp", said, repr(bad)): assert part in text


@pytest.mark.parametrize("bad,said", [(float("nan"), "not a whole number"), (None, "not a whole number"), (T0 + .5, "not a whole number"),
                                      (T0 * 1000., "milliseconds"), (-1., "negative"), (2.**60, "not a whole number")])
def test_f39_bad_times_of_a_parquet(tmp_path, bad, said):
    times = [float(T0 + k) for k in range(20)]
    times[4] = bad
    text = message(read_events, typed(tmp_path / "a.parquet", times))
    assert "a.parquet: 1 of 20 rows is bad" in text and "row 4, column timestamp" in text and said in text


def test_f39_declared_unit(tmp_path):
    path = log(tmp_path / "a.csv", rows(3))
    text = message(read_events, log(tmp_path / "b.csv", f"u,i,view,{T0}000\n"), unit="s")
    assert "looks like milliseconds, while the file was declared as seconds" in text
    assert read_events(path, unit="order").unit == "order" and read_events(path).counts["unit_from"] == "detected"
    assert "'s', 'ms', 'order'" in message(read_events, path, unit="minutes")
    assert "finer than milliseconds" in message(read_events, log(tmp_path / "c.csv", f"u,i,view,{T0}000000\n"))
    assert read_events(log(tmp_path / "d.csv", "u,i,view,3\nu,j,view,4\n")).unit == "order"


def test_f39_quarantine_of_a_parquet(tmp_path):
    times = [float(T0 + k) for k in range(200)]
    times[4] = None
    events = read_events(typed(tmp_path / "a.parquet", times), on_bad_rows="quarantine", bad_rows_to=tmp_path / "bad.csv")
    assert len(events) == 199
    assert pl.read_csv(tmp_path / "bad.csv").select("file", "row", "column").rows() == [("a.parquet", 4, "timestamp")]


# ---- the fast way never says anything else than the careful one ----

@pytest.mark.parametrize("size", [1 << 24, 1, 20])
def test_fast_and_careful_agree(tmp_path, monkeypatch, size):
    monkeypatch.setattr(mbnb.events, "CHUNK", size)
    rng, agreed = random.Random(7), 0
    pieces = ["a", "b", "7", ",", ",", ",", "\n", "\n", '"', "\r\n", "é", " ", "a,b,c\n",
              "d,e,f\n", '"x,y",b,c\n', '"p\nq",b,c\n', "x,y,\n", '5" x,b,c\n', '"say ""hi""",b,c\n', "\0", b"\xe9"]
    chosen = {"user": "a", "item": "b", "behavior": "c"}
    for k in range(1500 if size > 100 else 500):
        body = [rng.choice(pieces) for _ in range(rng.randint(1, 12))]
        if k % 2: body = [rng.choice(pieces[12:19]) for _ in range(rng.randint(1, 5))] + body[:1]
        data = b"a,b,c\n" + b"".join(p if isinstance(p, bytes) else p.encode() for p in body)
        try: t = _open_text(log(tmp_path / "a.csv", data), quote=rng.choice([None, ""]))
        except DataError: continue
        fast = _fast(t, chosen)
        good, kept, faults, n = _walk(t)
        if fast is not None:
            agreed += 1
            assert not len(faults) and n == len(fast), data
            t.data, t.line, t.start = good.getvalue(), 1, 0
            assert _read_rows(t, chosen)[0].equals(fast), data
    assert agreed > 20


def test_chunks_do_not_change_what_is_seen(tmp_path, monkeypatch):
    import mbnb.events as ev
    path = log(tmp_path / "a.csv", rows(50, {7: f"ключ,é,view,{T0}"}))
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(ev, "CHUNK", size)
        seen = ev._look_at_bytes(_open_text(path))
        assert seen.good and seen.lines == 50, size
        for tail in (b"\n", b"\r\n", b"u,i\n", b"\xe9", b"u,i,view,\xc3"):              # the last one ends inside a character
            assert not ev._look_at_bytes(_open_text(log(tmp_path / "b.csv", path.read_bytes() + tail))).good, (size, tail)


# ---- forms ----

def test_gear_log(tmp_path):
    events = read_events(log(tmp_path / "mini.txt", f"1\t100\tclick\t{T0}\n2\t007\tbuy\t{T0 + 1}\n".encode()), **GEAR_LOG)
    assert events.frame.rows() == [("1", "100", "click", T0, 0), ("2", "007", "buy", T0 + 1, 1)] and events.unit == "s"


def test_typed_header_of_recbole(tmp_path):
    path = log(tmp_path / "a.inter", "1\t2\t5\t881250949\n", head="user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
    assert read_events(path, behavior="rate").frame.rows() == [("1", "2", "rate", 881250949, 0)]


def test_frames_and_files_agree(tmp_path):
    path = log(tmp_path / "a.csv", rows(50))
    frame = pl.read_csv(path)
    assert from_frame(frame).frame.equals(read_events(path).frame) and from_frame(frame.to_pandas()).frame.equals(read_events(path).frame)


# ---- F43 a log of ten million rows in 4 GiB ----

PREPARE = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (int(float(sys.argv[2]) * 2**30),) * 2)
import mbnb.events, mbnb.sequences
mbnb.events.SILENT = mbnb.sequences.LARGE = float(sys.argv[3])
mbnb.events.CHUNK = int(sys.argv[4])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
begun, empty = time.perf_counter(), peak()
events = mbnb.events.read_events(sys.argv[1])
seconds = time.perf_counter() - begun
s = mbnb.sequences.from_events(events, name="log", min_user=5, min_item=5)
print(json.dumps([len(events), seconds, time.perf_counter() - begun, empty, peak(), s.data_hash, len(s.test)]))
"""


def large(path, parts, n):
    "A log of `parts` times `n` events; 20 to a user, 100 to an item."
    rng = np.random.default_rng(0)
    with open(path, "wb") as f:
        f.write(HEAD.encode())
        for part in range(parts):
            frame = {"user": rng.integers(0, n * parts // 20, n), "item": rng.integers(0, n * parts // 100, n)}
            pl.DataFrame(frame | {"behavior": rng.choice(["view", "cart", "buy"], n),
                                  "timestamp": T0 + np.arange(n) + n * part}).write_csv(f, include_header=False)
    return path


def prepared(path, gib, silent=0, chunk=1 << 24):
    """A file read and split in a process that may have `gib` GiB of addresses
    -> [rows, seconds of reading, of all, GiB before, at the peak, hash, cases], stderr."""
    few = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", PREPARE, str(path), str(gib), str(silent), str(chunk)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | few)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


def test_f43_rows_are_read_in_parts_and_the_progress_is_shown(tmp_path, capsys):
    path = large(tmp_path / "large.csv", 4, 100_000)
    (n, _, _, empty, peak, digest, cases), err = prepared(path, 1.5, chunk=1 << 20)
    assert n == 400_000 and peak - empty < 0.2, f"{peak - empty:.2f} GiB for {path.stat().st_size / 2**30:.3f} GiB of text"
    told = [line for line in err.splitlines() if "% done" in line]
    assert len(told) >= 3 and all(line.startswith("large.csv: reading, ") for line in told), err
    assert "log: numbering and sorting 400,000 events" in err and "log: looking for leaks in" in err
    again = from_events(read_events(path), name="log", min_user=5, min_item=5)
    assert again.data_hash == digest and len(again.test) == cases
    assert capsys.readouterr().err == "", "what takes a moment is done in silence"


def test_f43_the_careful_way_tells_its_progress_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mbnb.events, "SILENT", 0)
    with pytest.raises(DataError, match="1 of 50 rows is bad"): read_events(log(tmp_path / "a.csv", rows(50, {7: "short"})))
    assert "a.csv: looking at each row, " in capsys.readouterr().err


@pytest.mark.slow
def test_f43_ten_million_rows_in_4_gib(tmp_path):
    "Read in 20 s and, with the split, in 60 s on a core that is not shared; 4 GiB of addresses, of which a good half is used."
    path = large(tmp_path / "large.csv", 10, 1_000_000)
    (n, read, whole, _, peak, _, _), err = prepared(path, 4, silent=1)
    print(f"{n:,} rows, {path.stat().st_size / 1e6:.0f} MB: read in {read:.1f} s, all in {whole:.1f} s, peak {peak:.2f} GiB")
    assert n == 10_000_000 and peak < 2.5 and read < 40 and whole < 120 and "% done" in err
