"Faults of the data that show when sequences are made: F36, F37, F40, F41, F42."

import polars as pl
import pytest

from mbnb.events import DataError, Events
from mbnb.sequences import batches, from_events, next_items


def events(rows, unit="s"):
    frame = pl.DataFrame(rows, schema=["user", "item", "behavior", "timestamp"], orient="row").with_row_index("row")
    return Events(frame.with_columns(pl.col("row", "timestamp").cast(pl.Int64)), unit, "log.csv", {})


def log(n_users=6, n_events=5, gap=10):
    return [(f"u{u}", f"i{(u + k) % 7}", "view", u + gap * k) for u in range(n_users) for k in range(n_events)]


def test_f36_unsorted_file_gives_the_same_sequences():
    rows = log()
    a, b = (from_events(events(r), name="log") for r in (rows, rows[::-1]))
    assert (a.data_hash, a.split_hash) == (b.data_hash, b.split_hash)


def test_f37_ties_keep_the_order_of_the_file_and_are_reported():
    rows = [
        ("a", "x", "view", 1),
        ("a", "y", "view", 2),
        ("a", "z", "view", 3),
        ("a", "w", "view", 3),
        ("b", "x", "view", 1),
        ("b", "y", "view", 2),
        ("b", "z", "view", 3),
    ]
    s = from_events(events(rows), name="log")
    assert s.items[s.test.target].tolist() == ["w", "z"]
    assert s.leaks["last_two_tied_share"] == 0.5
    swapped = from_events(events(rows[:2] + [rows[3], rows[2]] + rows[4:]), name="log")
    assert swapped.split_hash != s.split_hash


def test_f40_short_users_are_dropped_and_counted():
    s = from_events(events(log() + [("short", "i1", "view", 1), ("shorter", "i2", "view", 1), ("shorter", "i3", "view", 2)]), name="log")
    assert s.counts["users_too_short"] == 2 and "short" not in s.users.tolist()


def test_f40_mostly_short_users_are_an_error():
    rows = log(2) + [(f"s{k}", "i1", "view", 1) for k in range(3)]
    with pytest.raises(DataError, match="3 of 5 users have fewer than 3 events"):
        from_events(events(rows), name="log")


@pytest.mark.parametrize("cold, cases", [("miss", 6), ("drop", 5)])
def test_f41_unseen_targets_are_counted_and_follow_the_policy(cold, cases):
    rows = log()
    rows[4] = ("u0", "never seen before", "view", 1000)
    s = from_events(events(rows), name="log", cold=cold)
    assert len(s.test) == cases and s.leaks["cold_test_targets"] == (1 if cold == "miss" else 0)
    assert cold == "miss" or s.counts["cold_cases_dropped"] >= 1


def test_f42_one_user():
    s = from_events(events(log(1)), name="log")
    (batch,) = batches(s, s.train, 4, 10)
    assert len(s.test) == 1 and int((next_items(batch) > 0).sum()) == 2


def test_f42_one_item():
    s = from_events(events([(f"u{u}", "only", "view", k) for u in range(3) for k in range(4)]), name="log")
    assert s.n_items == 1 and len(s.test) == 3


def test_f42_nothing_left_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match="core is empty.*lower min_user or min_item"):
        from_events(events(log()), name="log", min_item=50)
    with pytest.raises(DataError, match="target behavior 'buy' does not occur; the file has"):
        from_events(events(log()), name="log", target="buy")


def test_auxiliary_event_after_the_target_never_reaches_the_input():
    rows = [
        ("a", "p", "view", 1),
        ("a", "q", "view", 2),
        ("a", "p", "buy", 3),
        ("a", "q", "cart", 4),
        ("a", "q", "buy", 5),
        ("a", "r", "view", 6),
        ("b", "p", "view", 1),
        ("b", "q", "view", 2),
        ("b", "q", "buy", 2),
    ]
    for how in ({"split": "leave_one_out"}, {"split": "global_temporal", "cuts": (2, 4)}):
        s = from_events(events(rows), name="log", target="buy", **how)
        for cases in (s.valid, s.test):
            for start, stop, time in zip(cases.start, cases.stop, cases.target_time):
                assert (s.time[start:stop] <= time).all()
        assert s.leaks["own_train_after_test"] == 0
