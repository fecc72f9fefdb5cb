"""The doctor's questions to the data: each fault raises its card with its numbers, and the clean twin none."""
import time
from dataclasses import fields, replace

import numpy as np
import polars as pl
import pytest

from mbnb import datasets
from mbnb.doctor import data, limits
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import Plan
from mbnb.events import ListRows, from_frame
from mbnb.sequences import Cases, from_events, from_lists


@pytest.fixture(scope="module")
def tiny(): return datasets.load("toyshop-tiny")


@pytest.fixture(scope="module")
def buys(): return datasets.load("toyshop-tiny", target="buy")


def join(*parts): return Cases(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Cases)))


def log(rows, **how):
    "Sequences from rows (user, item, behavior, time)."
    frame = pl.DataFrame(rows, schema=["user", "item", "behavior", "timestamp"], orient="row")
    return from_events(from_frame(frame, unit="s"), name="log", **how)


def lists(rows):
    frame = [dict(row=k, items=a, behaviors=["view"] * len(a), target=t, target_behavior="buy") for k, (a, t) in enumerate(rows)]
    return ListRows(pl.DataFrame(frame), "rows", {})


def plan(candidates, name="fixed", m=None):
    n, k = candidates.shape
    return Plan(name, name, None, candidates, np.full(n, k + 1, np.int32))


def grave(cards): return {c.id: c.severity for c in cards if c.severity in "EW"}


# ---- the clean twin ----

@pytest.mark.parametrize("name", ["toyshop", "toyshop-tiny"])
def test_the_toy_shop_is_healthy(name):
    s = datasets.load(name)
    plans = [make_plan(s, s.test, p, seen_filter="none", split="test") for p in ("full", "full/none", "uni9")]
    started = time.process_time()
    cards = data.check_data(s, max_len=72, plans=plans, rules={"copy_recency": {"HR@10": .5}})
    assert time.process_time() - started < 2
    assert grave(cards) == {}
    assert sorted({c.id for c in cards}) == [f"D{k:02d}" for k in range(1, 18)]
    assert {c.id for c in cards if c.severity == "skipped"} == {"D01", "D04", "D05", "D06", "D09", "D15", "D16"}


def test_clean_twins_of_what_is_given(tiny):
    side = {"titles": [*tiny.items[1:]]}
    printed = {"users": 200, "items": 100, "rows": 9_496, "per_user": "47.48", "per_item": 94.96, "sparsity": "52.52 %"}
    codes = np.stack([np.arange(100) // 10, np.arange(100) % 10], 1)
    for kind in ("user-item", "next"):
        graph = (data.pairs_of(tiny, kind, tiny.train), kind)
        cards = data.check_data(tiny, max_len=72, printed=printed, sides=side, codes=codes, graph=graph)
        assert {c.id: c.severity for c in cards if c.id in ("D01", "D04", "D05", "D06", "D15", "D16")} == dict.fromkeys(
            ("D01", "D04", "D05", "D06", "D15", "D16"), "ok")


def test_every_finding_has_a_number_a_value_and_advice(tiny):
    bad = replace(tiny, valid=tiny.test, train=join(tiny.train, tiny.test), time=tiny.time // 86_400 * 86_400)
    cards = data.check_data(bad, max_len=5, plans=[plan(np.ones((200, 10), np.int32) * np.arange(1, 11, dtype=np.int32))], now=0,
                            printed={"users": 1, "items": 100, "rows": 9}, codes=np.zeros((100, 1)), sides={"x": ["y"]})
    found = [c for c in cards if c.severity in "EWI"]
    assert len(found) >= 9
    for c in found:
        assert any(ch.isdigit() for ch in c.message) and c.fix.endswith(".") and not c.message.endswith(".")
        assert c.value is not None and c.threshold is not None, c


def test_small_sets_are_looked_at_without_an_error():
    one = log([("a", "x", "view", 10**9 + k) for k in range(5)])
    assert grave(data.check_data(one, max_len=10)).keys() <= {"D02", "D09"}
    two = log([(u, i, "view", 10**9 + 9 * k) for u in "ab" for k, i in enumerate("xyzxy")], split="global_temporal", cut_shares=(.5, .8))
    assert "E" not in grave(data.check_data(two, max_len=10)).values()


# ---- D01, D15: printed statistics ----

def test_D01_statistics_of_mgpt():
    card = data.stats_identity(users=30_691, items=31_240, rows=32_690, per_user=1.07, per_item=3.39, sparsity="99.997 %")
    assert card.severity == "E"
    assert card.message == "3.39 x 31,240 items = 105,904 rows, not 32,690; 3.39 fits 9,629-9,657 items"
    assert data.stats_identity(users=30_691, items=9_647, rows=32_690, per_user="1.07", per_item="3.39").severity == "ok"


def test_D01_rounding_is_no_fault():
    rng = np.random.default_rng(0)
    for users, items, rows in rng.integers(50, 100_000, (300, 3)).tolist():
        for digits in (0, 1, 2):
            told = {"per_user": f"{rows / users:.{digits}f}", "per_item": f"{rows / items:.{digits}f}"}
            assert data.stats_identity(users=users, items=items, rows=rows, **told).severity == "ok"
        empty = f"{100 * (1 - rows / users / items):.3f} %"
        if rows < users * items: assert data.stats_identity(users, items, rows, sparsity=empty).severity == "ok"


@pytest.mark.parametrize("more", [{}, {"rows": 5}, {"users": 5, "per_user": 2.}, {"rows": 5, "users": 2}, {"rows": 4, "sparsity": .5}])
def test_D01_needs_rows_and_something_beside_them(more): assert data.stats_identity(**more).severity == "skipped"


def test_D15_users_of_one_stage_items_of_another(tiny):
    card = data.mixed_stages({"users": 938, "items": 1_682})
    assert card.severity == "W" and "938 users" in card.message and "1,682 items" in card.message
    assert data.mixed_stages({"users": "943", "items": "1,682", "rows": 100_000}).severity == "ok"
    stages = {"read": {"users": 10, "items": 20, "rows": 30}, "used": {"users": 8, "items": 15, "rows": 25}}
    assert data.mixed_stages({"users": 8, "items": 20}, {"set": stages}).severity == "W"
    assert [data.mixed_stages(x, {"set": stages}).severity for x in stages.values()] == ["ok", "ok"]
    assert data.mixed_stages({"users": 7, "items": 21}, {"set": stages}).severity == "skipped"
    assert data.mixed_stages({"users": 8}, {"set": stages}).severity == "skipped"


# ---- D02, D03: lengths ----

def test_D02_leave_one_out_of_three_events():
    rows = [(u, i, "view", 10**9 + k) for u, items in {"a": "xyz", "b": "xyzxy", "c": "zyxzy"}.items() for k, i in enumerate(items)]
    card = data.split_lengths(log(rows))
    assert card.severity == "W" and "min length 3 minus 2 held out = 1 training event; 1 of 3 users" in card.message
    assert data.split_lengths(log([r for r in rows if r[0] != "a"])).severity == "ok"
    assert data.split_lengths(log(rows + [("d", "x", "view", 10**9)])).message.startswith("1 of 4 users have fewer than 3 events")


def test_D02_with_a_target_behavior(buys):
    left = data.training_events(buys)
    assert (left[buys.train.user] == buys.train.length + 1).all()
    bare = len(buys.users) - len(buys.train)
    card = data.split_lengths(buys)
    assert (card.severity == "W") == bool(bare) and (not bare or f"{bare} of 200 users" in card.message)


def test_D03_padding_and_cutting():
    assert data.padding([15] * 10, 199).message == "max_len 199, mean 15.0: 92 % padding"
    assert data.padding([15] * 10, 199).severity == "I" and data.padding([15] * 10, 20).severity == "ok"
    card = data.padding([10] * 7 + [60] * 3, 50)
    assert card.severity == "W" and "30.0 %" in card.message and card.patch == {"max_len": 60}
    assert data.padding([10] * 7 + [60] * 3, 50, limits(**{"D03.truncated": .4})).severity == "ok"


# ---- D04, D05, D06: side tables, generated ids ----

def test_F44_keys_with_the_title_stop_the_run():
    "Keys `ASIN title ...`: nothing is found, every look-up falls to the default, and the card names the mend."
    items = [f"B{k:09d}" for k in range(12_101)]
    card = data.coverage([f"{t} Soap with roses" for t in items], items)
    assert card.severity == "E"
    assert "0 of 12,101 items found; all 12,101 match if keys end at the first blank" in card.message and card.fix
    assert data.coverage(items, items).severity == "ok"


def test_F44_in_a_data_set(tiny):
    cards = data.check_data(tiny, max_len=72, sides={"titles": [f"{t} Soap" for t in tiny.items[1:]], "good": tiny.items[1:]})
    found = [(c.id, c.severity, c.message.partition(":")[0]) for c in cards if c.id in ("D04", "D05")]
    assert found == [("D04", "E", "titles"), ("D04", "ok", "good"), ("D05", "E", "titles"), ("D05", "ok", "good")]


@pytest.mark.parametrize("spell, words", [
    ("item:{}", "keys lose their first 5 characters"), ("{} ", "blanks around"), ("{}.0", "'.0'"), ("00{}", "zeros in front"),
    ("{} | red", "first blank"), ("{}-x", "keys end after 3")])
def test_D04_names_the_mend(spell, words):
    items = range(100, 900)
    card = data.coverage([spell.format(i) for i in items], items)
    assert card.severity == "E" and "all 800 match if" in card.message and words in card.message


def test_D04_severities():
    items = [str(k) for k in range(1_000)]
    assert [data.coverage(items[:n], items).severity for n in (1_000, 999, 950, 949, 500, 499, 0)] == ["ok", "I", "I", "W", "W", "E", "E"]
    assert data.coverage(items, []).severity == "skipped"


def test_D05_defaults():
    answers = np.arange(1, 101)
    assert data.default_fill(answers).severity == "ok"
    assert [data.default_fill(np.where(answers <= n, 0, answers)).severity for n in (5, 6, 50, 51, 100)] == ["ok", "W", "W", "E", "E"]
    assert data.default_fill(np.where(answers < 30, -1, answers), default=-1).value == pytest.approx(.29)


def test_D06_ids():
    rng = np.random.default_rng(0)
    codes = np.stack([np.arange(500) // 25, np.arange(500) % 25], 1)
    assert data.bijection(codes).severity == "ok"
    shared = codes.copy(); shared[1:37] = shared[0]
    assert "37 of 500 items share a generated id" in data.bijection(shared).message
    lost = data.bijection(encode=lambda i: [i // 10, i % 10], decode=lambda c: c[0] * 10 + min(c[1], 8), n_items=99)
    assert lost.severity == "E" and "10 of 99 items do not come back" in lost.message
    assert data.bijection(codes, decode=lambda c: c[0] * 25 + c[1] + 1).severity == "ok"
    assert data.bijection(rng.permutation(codes)).severity == "ok" and data.bijection().severity == "skipped"


# ---- D07, D08, D09: events ----

def test_D07_duplicates(tiny):
    owner = np.repeat(np.arange(200), np.diff(tiny.offsets))
    columns = [owner, tiny.item, tiny.behavior, tiny.time]
    assert data.duplicates(*columns).severity == "ok"
    card = data.duplicates(*[np.append(x, x[:1]) for x in columns])
    assert card.severity == "I" and card.message.startswith("1 of 9,497 events") and card.patch == {"set": "data.duplicates=drop"}
    assert data.duplicates(*[np.append(x, x[:600]) for x in columns]).severity == "W"


def test_D08_a_log_without_times(tmp_path):
    "Row order is taken for time, and that is said."
    rows = [f"u{u},i{(u + k) % 9},view" for u in range(30) for k in range(6)]
    (tmp_path / "a.csv").write_text("\n".join(["user,item,behavior", *rows]) + "\n")
    card, = [c for c in data.check_data(datasets.load(tmp_path / "a.csv"), max_len=20) if c.id == "D08"]
    assert card.severity == "I" and "no column of times" in card.message


def test_D08_time_stamps(tiny):
    owner = np.repeat(np.arange(200), np.diff(tiny.offsets))
    late = tiny.time.max() + 10
    check = lambda time, **more: data.time_stamps(time, owner, **{"now": late, **more})
    assert check(tiny.time).severity == "ok"
    assert check(tiny.time * 1_000, unit="ms").severity == "ok"
    assert "1 times count seconds and 9,495 milliseconds" in check(np.where(np.arange(9_496) > 0, tiny.time * 1_000, tiny.time)).message
    assert check(tiny.time * 0 + 10**9).severity == "E"
    assert check(tiny.time, now=tiny.time.min() - 1).message.startswith("9,496 of 9,496 events lie in the future")
    back = tiny.time.copy(); back[[3, 4]] = back[[4, 3]]
    assert check(back).severity == "I" and "1 events" in check(back).message
    tied = tiny.time.copy(); ends = tiny.offsets[1:] - 1; tied[ends[:11]] = tied[ends[:11] - 1]
    assert check(tied).severity == "W" and "5.5 % of 200 users" in check(tied).message
    tied[ends[10]] += 1
    assert check(tied).severity == "ok"
    assert check(tiny.time, tied=np.arange(100) < 44).message == "44.0 % of 100 test cases tie with the newest event of their input"


def test_D09_funnel(buys):
    counts = data.behavior_counts(buys)
    assert sum(counts.values()) == len(buys.item) and data.funnel(counts, ["buy"]).severity == "ok"
    assert data.funnel(counts | {"buy": 30}, ["buy"]).message.startswith("buy 0.34 % of events (30 of")
    assert data.funnel(counts | {"buy": 0}, ["buy"]).severity == "E"
    assert data.funnel(counts | {"buy": counts["view"] + 1}, ["buy"]).severity == "W"
    assert data.funnel(counts | {"buy": counts["view"] + 1}, ["buy"], collapsed=True).severity == "ok"
    given = from_lists(lists([(["a"], "b"), (["c"], "d")]), lists([(["a", "b"], "c")]), name="given", valid=lists([(["b"], "c")]))
    assert data.behavior_counts(given) == {"buy": 4, "view": 5}


# ---- D10, D11, D13: splits ----

def test_D10_own_events_after_the_test(tiny):
    assert data.time_leak(tiny).severity == "I"                        # leave-one-out: other users' later events
    assert data.time_leak(datasets.load("toyshop-tiny", split="global_temporal")).severity == "ok"
    when = tiny.train.target_time.copy(); when[:12] = tiny.test.target_time[:12] + 1
    card = data.time_leak(replace(tiny, train=replace(tiny.train, target_time=when)))
    assert card.severity == "E" and card.message.startswith("12 of 200 test cases") and card.evidence.startswith("test cases 0, 1, 2")
    assert data.time_leak(replace(tiny, unit="order")).severity == "skipped"


def test_D11_validation_is_the_test(tiny):
    assert data.overlap(tiny).severity == "ok"
    assert "the same 200 targets" in data.overlap(replace(tiny, valid=tiny.test)).message
    mixed = tiny.test.take(np.random.default_rng(0).permutation(200))
    assert data.overlap(replace(tiny, valid=mixed)).severity == "E"
    one = replace(tiny, valid=tiny.test.take(slice(0, 199)))
    assert data.overlap(one).severity == "W"                           # not the same questions, but 199 of them


def test_D11_the_test_file_given_as_validation():
    "Rows of ready-made lists carry row numbers as users: the same questions are found by their content."
    test = [(["a", "b"], "c"), (["b"], "a"), (["d", "a"], "b")]
    s = from_lists(lists([(["a"], "b"), (["b", "c"], "d")]), lists(test), name="given", valid=lists(test[::-1]))
    assert data.overlap(s).severity == "E" and "same 3 targets" in data.overlap(s).message
    s = from_lists(lists([(["a"], "b"), (["b"], "a")]), lists(test), name="given", valid=lists([(["a", "c"], "c")]))
    assert data.overlap(s).severity == "W" and data.overlap(s).message.startswith("1 of 3 test rows (33.33 %)")
    assert data.overlap(s).evidence == "test cases 1"


def test_D11_target_in_the_input(tiny):
    late = replace(tiny.test, stop=tiny.test.stop + (np.arange(200) < 7))
    card = data.overlap(replace(tiny, test=late))
    assert card.severity == "E" and "the input of 7 of 200 test cases" in card.message
    late = replace(tiny.valid, stop=tiny.valid.stop + 1)
    assert "200 of 200 valid cases" in data.overlap(replace(tiny, valid=late)).message


def test_D11_an_event_that_the_log_holds_twice_is_no_leak():
    rows = [(u, i, "view", 10**9 + k) for u in "abc" for k, i in enumerate("wxyzv")]
    s = log(rows + [(u, "v", "view", 10**9 + 4) for u in "abc"])
    assert data.in_history(s, s.test).all() and not data.holds_target(s, s.test).any()
    assert data.holds_target(s, replace(s.test, stop=s.test.stop + 1)).all()


def test_case_keys_tell_rows_apart(tiny):
    other = replace(tiny.test, start=tiny.test.start + 1), replace(tiny.test, target=tiny.valid.target)
    every = join(tiny.train, tiny.valid, tiny.test, *other)
    rows = [(*tiny.item[a:b].tolist(), int(t)) for a, b, t in zip(every.start, every.stop, every.target)]
    keys = data.case_keys(tiny, every).tolist()
    assert len(set(keys)) == len(set(rows)) == len(set(zip(keys, rows)))


def test_D13_cold_targets(tiny):
    trained, known = data.items_of(tiny, tiny.train), data.items_of(tiny, tiny.train, tiny.valid)
    slow = np.zeros(101, bool)
    for c in (tiny.train, tiny.valid):
        for a, b, t in zip(c.start, c.stop, c.target): slow[[*tiny.item[a:b], t]] = True
    assert (slow == known).all() and data.cold_targets(tiny.test.target, trained, known).severity == "ok"
    target = np.arange(1, 101)
    never = np.arange(101) <= 11
    card = data.cold_targets(target, ~never)
    assert card.severity == "W" and "11 of 100 test targets = 11.00 %" in card.message
    assert data.cold_targets(target, np.arange(101) != 5).severity == "I"


# ---- D12, D14: what the task is ----

def test_D12_repeats():
    rules = {"pop": {"HR@10": .99}, "copy_recency": {"HR@10": .986, "HR@10[fixed100]": .994}, "copy_behavior": {"note": "not applicable"}}
    repeat = np.arange(2_000) < 1_986
    card = data.repeat_share(repeat, rules)
    assert card.severity == "I" and "rho 99.3 %" in card.message and "(copy_recency) has HR@10 .986 on the full catalogue" in card.message
    assert data.repeat_share(repeat, rules, slices=False).severity == "W"
    assert data.repeat_share(repeat, rules, model={"HR@10": .986}).severity == "W"
    assert data.repeat_share(repeat, rules, model={"HR@10": .987}).severity == "I"
    assert data.repeat_share(np.arange(10) < 3, slices=False).severity == "I"
    assert data.repeat_share(np.zeros(10, bool)).severity == "ok"
    filtered = {"copy_recency": {"note": "the filter removes every item", "HR@10[full/none]": .2, "HR@10[uni99]": .9}}
    assert data.best_copy(filtered) == ("HR@10[full/none]", "copy_recency", .2)


def test_D14_shuffled_histories_keep_all_but_the_order(tiny):
    rows = np.array([4, 0, 9])
    s, cases = data.shuffled(tiny, tiny.test, rows, seed=3)
    for k, row in enumerate(rows):
        a, b, c, d = tiny.test.start[row], tiny.test.stop[row], cases.start[k], cases.stop[k]
        pairs = lambda s, a, b: sorted(zip(s.item[a:b].tolist(), s.behavior[a:b].tolist()))
        assert pairs(tiny, a, b) == pairs(s, c, d) and (tiny.time[a:b] == s.time[c:d]).all()
    assert (cases.user == tiny.test.user[rows]).all() and (cases.target == tiny.test.target[rows]).all()
    assert s.item.dtype == tiny.item.dtype and s.first.dtype == bool and len(s.first) == len(s.time) == len(s.behavior)
    again = data.shuffled(tiny, tiny.test, rows, seed=3)[0]
    assert (again.item == s.item).all() and (data.shuffled(tiny, tiny.test, rows, seed=4)[0].item != s.item).any()
    assert (data.in_history(s, cases) == data.in_history(tiny, tiny.test.take(rows))).all()


def test_D14_order(tiny):
    assert data.order_in_data(tiny).severity == "ok"
    shop = datasets.load("toyshop")
    owner = np.repeat(np.arange(len(shop.users)), np.diff(shop.offsets))
    item = shop.item[np.lexsort((np.random.default_rng(1).random(len(owner)), owner))]
    bag = replace(shop, item=item, **{k: replace(shop.cases(k), target=item[shop.cases(k).stop]) for k in ("train", "valid", "test")})
    assert data.order_in_data(bag).severity == "W" and data.order_in_data(shop).severity == "ok"
    assert data.order_matters(.1, .0951).severity == "W" and data.order_matters(.1, .0949).severity == "ok"


# ---- D16, D17: graph and candidates ----

@pytest.mark.parametrize("kind", ["user-item", "next"])
def test_D16_edges_of_the_test(tiny, kind):
    train, held = data.pairs_of(tiny, kind, tiny.train), data.pairs_of(tiny, kind, tiny.valid, tiny.test)
    new = {*map(tuple, held.T.tolist())} - {*map(tuple, train.T.tolist())}
    card = data.graph_leak(np.append(train, held, 1), train, held)
    assert card.severity == "E" and card.value == len(new) and f"{len(new):,} of" in card.message
    assert data.graph_leak(train, train, held).severity == "ok"
    other = np.array([[1], [99_999]])                                   # an edge that no row holds: unknown, not leaked
    assert data.graph_leak(other, train, held).severity == "ok" and data.graph_leak(other, train).severity == "E"


def test_D17_the_first_protocol_or_another(tiny):
    lists = np.tile(np.arange(1, 11, dtype=np.int32), (200, 1))
    full = Plan("", "full", None, None, np.full(200, 100, np.int32))
    graded = lambda plans: [c.severity for c in data.check_data(tiny, max_len=72, plans=plans) if c.id == "D17"]
    assert graded([plan(lists), full]) == ["E"] and graded([full, plan(lists)]) == ["W"]
    assert graded([full]) == ["ok"] and graded([]) == ["skipped"] and graded([plan(lists), plan(lists, "more")]) == ["E", "W"]


def test_D17_order_within_the_list_does_not_hide_it():
    rng = np.random.default_rng(0)
    one = rng.permuted(np.tile(rng.permutation(1_000)[:100], (500, 1)), axis=1) + 1
    card = data.constant_candidates(one, 1_000, "fixed100")
    assert card.severity == "E" and "all 500 cases share one list of 100 ids" in card.message and card.patch == {"protocol": "full"}
    few = one.copy(); few[:, :9] = rng.integers(1, 1_001, (500, 9))
    assert data.constant_candidates(few, 1_000).severity == "E"          # nine of a hundred replaced


@pytest.mark.parametrize("protocol", ["uni1", "uni5", "uni9", "uni20", "uni45", "pop1", "pop5", "pop10", "pop20"])
def test_D17_own_draws_are_not_accused(tiny, protocol):
    plan = make_plan(tiny, tiny.test, protocol, seen_filter="none", split="test")
    assert data.constant_candidates(plan.candidates, tiny.n_items, protocol).severity == "ok"
