"""Rules without training: every one against a slow dictionary version, and what must never happen to them."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pytest

from mbnb.evaluators import baselines
from mbnb.evaluators.baselines import (
    BASELINES,
    Fitted,
    NotApplicable,
    badges,
    baseline_notes,
    baseline_rows,
    copy_behavior,
    item_knn,
    learn_behaviors,
    markov,
    pop_behavior,
    rank_baselines,
    train_events,
)
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import EvalError, Plan
from mbnb.events import Events
from mbnb.sequences import Cases, Sequences, from_events

DAY = 86400
VARIANTS = {
    "markov_no_self": partial(markov, self_pairs=False),
    "item_knn_no_self": partial(item_knn, self_weight=False),
    "pop_behavior_cart": partial(pop_behavior, query="cart"),
    "copy_behavior_no_done": partial(copy_behavior, done=False),
    "copy_recency_done": partial(copy_behavior, strong=False),
}


def random_events(n_users=500, n_items=40, seed=0):
    "Events of 20 days; a third repeat an item of the user; every user buys at least twice; a returned item never comes back."
    rng, rows = np.random.default_rng(seed), []
    for u in range(n_users):
        mine, back = [], set()
        for _ in range(int(rng.integers(4, 16))):
            old = [i for i in mine if i not in back]
            item = int(rng.choice(old)) if old and rng.random() < 0.35 else int(n_items * rng.random() ** 2)
            if item in back: continue
            act = str(rng.choice(["view", "cart", "buy", "return"], p=[0.5, 0.2, 0.2, 0.1]))
            if act == "return": back.add(item)
            mine.append(item)
            rows.append((f"u{u}", f"i{item}", act))
        free = [i for i in range(n_items) if i not in back]
        rows += [(f"u{u}", f"i{rng.choice(free)}", "buy") for _ in range(2)]
    when = np.sort(rng.integers(0, 20 * DAY, len(rows)))
    frame = pl.DataFrame(rows, schema=["user", "item", "behavior"], orient="row")
    frame = frame.with_columns(timestamp=pl.Series(when), row=pl.int_range(pl.len(), dtype=pl.Int64))
    return Events(frame, "s", "random", {})


@pytest.fixture(scope="module")
def shop():
    return from_events(random_events(), name="random", target="buy", behaviors=("view", "cart", "buy", "return"))


@pytest.fixture
def small_limits(monkeypatch):
    "So few that cutting off neighbors and calling a behavior done both happen in a small shop."
    monkeypatch.setattr(baselines, "N_NEIGHBORS", 6)
    monkeypatch.setattr(baselines, "DONE_PAIRS", 20)


def full(sequences, cases):
    return make_plan(sequences, cases, "full", seen_filter="none", split="test")


# ---- the slow version: dictionaries, one candidate at a time ----


class Slow:
    "Every rule of the page by its definition."

    def __init__(self, s):
        self.s, t = s, s.train
        self.rows = []
        for a, b, item, act, when in zip(t.start, t.stop, t.target, t.target_behavior, t.target_time):
            past = list(zip(s.item[a:b].tolist(), s.behavior[a:b].tolist(), s.time[a:b].tolist()))
            self.rows.append(past + [(int(item), int(act), int(when))])
        self.c, self.cb, self.pair, self.state_pair, self.after = {}, {}, {}, {}, {}
        for row in self.rows:
            for i, b, _ in row:
                self.c[i] = self.c.get(i, 0) + 1
                self.cb[b, i] = self.cb.get((b, i), 0) + 1
            for (i, b, _), (j, _, _) in zip(row, row[1:]):
                self.pair[i, j] = self.pair.get((i, j), 0) + 1
                self.state_pair[i, b, j] = self.state_pair.get((i, b, j), 0) + 1
                self.after[i] = self.after.get(i, 0) + 1
        self.total = sum(self.c.values())
        last = max(when for row in self.rows for _, _, when in row)
        self.recent = {}
        for row in self.rows:
            for i, _, when in row:
                if when > last - 7 * DAY: self.recent[i] = self.recent.get(i, 0) + 1
        self.learn()
        self.w, self.w_no_self = self.weights(True), self.weights(False)

    def learn(self):
        hits, pairs = {}, {}
        for row in self.rows:
            newest = {i: b for i, b, _ in row[:-1]}
            for b in newest.values(): pairs[b] = pairs.get(b, 0) + 1
            if row[-1][0] in newest: hits[newest[row[-1][0]]] = hits.get(newest[row[-1][0]], 0) + 1
        self.rate = {b: hits.get(b, 0) / n for b, n in pairs.items()}
        self.strong = max(sorted(self.rate), key=lambda b: self.rate[b])
        self.done = {b for b, n in pairs.items() if not hits.get(b) and n >= baselines.DONE_PAIRS}

    def weights(self, self_weight):
        n, co, out = {}, {}, {}
        for row in self.rows:
            items = {i for i, _, _ in row}
            for i in items:
                n[i] = n.get(i, 0) + 1
                for j in items: co[i, j] = co.get((i, j), 0) + 1
        for i in n:
            w = {j: co[i, j] / (math.sqrt(n[i]) * math.sqrt(n[j]) + 10) for j in n if (i, j) in co and (self_weight or i != j)}
            out[i] = {j: w[j] for j in sorted(w, key=lambda j: (-w[j], j))[: baselines.N_NEIGHBORS]}
        return out

    def copy(self, h, v, strong=True, done=True):
        at = [k + 1 for k, (i, _) in enumerate(h) if i == v]
        if not at: return 0
        if done and any(b in self.done for i, b in h if i == v): return -1
        best = [k + 1 for k, (i, b) in enumerate(h) if i == v and b == self.strong]
        return len(h) + best[-1] if best and strong else at[-1]

    def knn(self, h, v, w):
        newest, total = {i: k for k, (i, _) in enumerate(h)}, 0.0
        for i in sorted(newest):
            if v in w.get(i, {}): total += 0.8 ** (len(h) - 1 - newest[i]) * w[i][v]
        return total

    def score(self, rule, h, v, q):
        "h: [(item, behavior), ...], oldest first; v the candidate; q the query behavior."
        c, (i, b) = self.c.get(v, 0), h[-1]
        at = [k + 1 for k, (j, _) in enumerate(h) if j == v]
        blind = self.pair.get((i, v), 0)
        return {
            "random": lambda: 0,
            "pop": lambda: c,
            "pop_behavior": lambda: (self.cb.get((q, v), 0), c),
            "pop_behavior_cart": lambda: (self.cb.get((2, v), 0), c),
            "pop_recent": lambda: self.recent.get(v, 0),
            "copy_recency": lambda: at[-1] if at else 0,
            "copy_pop": lambda: at[-1] if at else c / (2 * self.total),
            "copy_count": lambda: (len(at), at[-1] if at else 0),
            "copy_behavior": lambda: self.copy(h, v),
            "copy_behavior_no_done": lambda: self.copy(h, v, done=False),
            "copy_recency_done": lambda: self.copy(h, v, strong=False),
            "markov": lambda: blind + c / (2 * self.total),
            "markov_no_self": lambda: -1 if v == i else blind + c / (2 * self.total),
            "markov_behavior": lambda: self.state_pair.get((i, b, v), 0) + 0.5 * blind / (1 + self.after.get(i, 0)) + c / (4 * self.total),
            "item_knn": lambda: self.knn(h, v, self.w),
            "item_knn_no_self": lambda: self.knn(h, v, self.w_no_self),
        }[rule]()

    def place(self, rule, cases, plan):
        "[(g, e), ...] of the cases under a plan."
        out, s = [], self.s
        for n, (a, b, target) in enumerate(zip(cases.start, cases.stop, cases.target.tolist())):
            h, q = list(zip(s.item[a:b].tolist(), s.behavior[a:b].tolist())), int(cases.target_behavior[n])
            others = range(1, s.n_items + 1) if plan.candidates is None else [v for v in plan.candidates[n].tolist() if v]
            gone = set() if plan.seen is None else set(plan.seen[1][plan.seen[0][n] : plan.seen[0][n + 1]].tolist())
            if target in gone:
                out.append((int(plan.m[n]), 0))
                continue
            mine = self.score(rule, h, target, q)
            scores = [self.score(rule, h, v, q) for v in others if v != target and v not in gone]
            out.append((sum(x > mine for x in scores), sum(x == mine for x in scores)))
        return out


def counts(ranks):
    return list(zip(ranks.g.tolist(), ranks.e.tolist()))


def with_holes(plan, share=0.2):
    "Some places of the candidate list left empty."
    rng, c = np.random.default_rng(3), plan.candidates.copy()
    c[rng.random(c.shape) < share] = 0
    return replace(plan, candidates=c, m=((c > 0).sum(1) + 1).astype(np.int32), name="holes")


@pytest.mark.filterwarnings("ignore")
def test_equals_slow_version(shop, small_limits):
    cases, ask = shop.test, partial(make_plan, shop, shop.test, split="test", filtered_target="miss")
    plans = [ask("full", seen_filter="none"), ask("full/target_behavior", seen_filter="none"), ask("uni12", seen_filter="none")]
    plans += [with_holes(plans[2]), ask("pop9", seen_filter="none"), ask("full/all_seen", seen_filter="none")]
    assert len(cases) >= 500 and plans[1].missed.any()
    slow, fitted = Slow(shop), Fitted(shop)
    assert slow.done and shop.behaviors[fitted.learned.strong] == shop.behaviors[slow.strong]
    fast = rank_baselines(shop, cases, plans, BASELINES | VARIANTS, fitted=fitted)
    for rule, by_plan in fast.items():
        for plan in plans:
            if rule.startswith("copy") and plan.protocol == "full/all_seen":
                assert isinstance(by_plan[plan.name], NotApplicable)
                continue
            assert counts(by_plan[plan.name]) == slow.place(rule, cases, plan), (rule, plan.name)


def test_filter_beside_candidates(shop, small_limits):
    "A plan may hold both; then a masked negative counts neither above nor beside."
    cases = shop.test.take(slice(0, 60))
    seen = make_plan(shop, cases, "full/all_seen", seen_filter="none", split="test", filtered_target="miss")
    rng = np.random.default_rng(0)
    negatives = np.array([rng.permutation([v for v in range(1, shop.n_items + 1) if v != t])[:15] for t in cases.target], np.int32)
    plan = replace(seen, name="both", candidates=negatives, m=np.full(len(cases), 16, np.int32))
    slow = Slow(shop)
    for rule in ("pop", "markov", "item_knn"):
        assert counts(rank_baselines(shop, cases, [plan], [rule])[rule]["both"]) == slow.place(rule, cases, plan)


def test_chunks_and_threads_change_nothing(shop, monkeypatch):
    plan = full(shop, shop.test)
    one = rank_baselines(shop, shop.test, [plan], threads=1)
    monkeypatch.setattr(baselines, "_chunks", partial(baselines._chunks, events=50))
    many = rank_baselines(shop, shop.test, [plan], threads=3)
    for name in one: assert counts(one[name][""]) == counts(many[name][""])


def test_lone_cases(shop):
    "A case gets the same counts alone as among others: nothing is shared between cases but what is fitted."
    plan = full(shop, shop.test)
    together = rank_baselines(shop, shop.test, [plan])
    for n in (0, 77, 499):
        alone, one = shop.test.take([n]), replace(plan, m=plan.m[[n]])
        for name, by_plan in rank_baselines(shop, alone, [one]).items():
            assert counts(by_plan[""]) == counts(together[name][""])[n : n + 1], name


def test_fitted_on_train_only(shop):
    "Events behind the train part may change to anything: no count moves, and ranks only by what the histories of the cases hold."
    trained = np.zeros(len(shop.item), bool)
    for a, b in zip(shop.train.start, shop.train.stop): trained[a : b + 1] = True      # the row's target stands right behind its input here
    rng = np.random.default_rng(5)
    other = replace(
        shop,
        item=np.where(trained, shop.item, rng.integers(1, shop.n_items + 1, len(shop.item))).astype(np.int32),
        behavior=np.where(trained, shop.behavior, 1).astype(np.int32),
        time=np.where(trained, shop.time, shop.time + 100 * DAY),
        test=replace(shop.test, target=shop.test.target[::-1].copy(), target_time=shop.test.target_time + 100 * DAY),
    )
    assert (~trained).sum() >= 1000
    a, b = Fitted(shop), Fitted(other)
    assert (a.popularity == b.popularity).all() and (a.pairs() != b.pairs()).nnz == 0 and (a.neighbors != b.neighbors).nnz == 0
    assert (a.pairs(behaviors=True) != b.pairs(behaviors=True)).nnz == 0 and (a.learned.hits == b.learned.hits).all()
    assert (baselines.pop_recent(a).base == baselines.pop_recent(b).base).all()


def test_added_test_events_change_nothing(shop):
    "Ten more events of every user behind the last case: the same ranks of the same cases."
    n, gap = np.diff(shop.offsets), 10
    at = np.repeat(shop.offsets[1:], gap)
    add = partial(np.insert, obj=at)
    shift = lambda c: replace(c, start=c.start + gap * c.user, stop=c.stop + gap * c.user)
    longer = replace(
        shop,
        offsets=np.append(0, np.cumsum(n + gap)),
        item=add(shop.item, values=np.tile([1, 2, 3, 4, 5], len(at) // 5)),
        behavior=add(shop.behavior, values=2),
        time=add(shop.time, values=40 * DAY),
        first=np.ones(len(shop.item) + len(at), bool),
        **{part: shift(getattr(shop, part)) for part in ("train", "valid", "test")},
    )
    before, after = (rank_baselines(s, s.test, [full(s, s.test)]) for s in (shop, longer))
    for name in before: assert counts(before[name][""]) == counts(after[name][""]), name


# ---- single rules ----


def rows(*texts, behaviors=("", "view", "cart"), target_behaviors=(2,), unit="order"):
    "Sequences from rows `item.behavior ... > target`, behaviors by initial; each row trains without its target and is a test case with it."
    split, initial = [t.split(">") for t in texts], [b[:1] for b in behaviors]
    events = [[(int(i), initial.index(b)) for i, b in (e.split(".") for e in t[0].split())] for t in split]
    target = np.array([int(t[1]) for t in split], np.int32)
    offsets = np.append(0, np.cumsum([len(e) for e in events]))
    item, behavior = (np.array([e[k] for row in events for e in row], np.int32) for k in (0, 1))
    n_items, user, last = int(max(item.max(), target.max())), np.arange(len(texts)), offsets[1:] - 1
    train = Cases(user, offsets[:-1], last, item[last], behavior[last], last)
    test = Cases(user, offsets[:-1], offsets[1:], target, np.full(len(texts), 2, np.int32), offsets[1:])
    tokens = np.array([""] + [str(i) for i in range(1, n_items + 1)], object)
    users, time, first = user.astype(str).astype(object), np.arange(len(item)), np.ones(len(item), bool)
    return Sequences("rows", users, tokens, behaviors, offsets, item, behavior, time, first, train, test.take(slice(0, 0)), test,
                     unit=unit, target_behaviors=target_behaviors)


def test_copy_ties():
    "Optimistic ties would give a copy rule HR@10 = 1 on a case without repeats; by expectation it earns its chance."
    s = rows("1.v 2.v > 60", "3.v 3.c > 3")
    for name in ("copy_recency", "copy_count", "copy_behavior"):
        r = rank_baselines(s, s.test, [full(s, s.test)], [name])[name][""]
        assert counts(r) == [(2, 57), (0, 0)]
        assert per_case(r, "HR", 10).tolist() == [8 / 58, 1.0]
        assert per_case(r, "HR", 10, ties="optimistic").tolist() == [1.0, 1.0]


def test_random_is_analytic():
    s = rows("1.v 2.v > 60", "3.v 3.c > 3")
    plan = full(s, s.test)
    row = baseline_rows(rank_baselines(s, s.test, [plan], ["random"]))["random"]
    assert row["HR@10"] == pytest.approx(10 / 60) and row["NDCG@10"] == pytest.approx(4.5436 / 60, abs=1e-6)
    assert row["MRR@10"] == pytest.approx(2.9290 / 60, abs=1e-6)


def test_all_seen_refused(shop):
    plan = make_plan(shop, shop.test, "full", seen_filter="all_seen", split="test", filtered_target="miss")
    ranks, fitted = rank_baselines(shop, shop.test, [plan]), Fitted(shop)
    refused = {n for n, r in ranks.items() if isinstance(r[""], NotApplicable)}
    assert refused == {"copy_recency", "copy_pop", "copy_count", "copy_behavior"}
    assert str(ranks["copy_pop"][""]) == "not applicable: the filter removes every item the rule scores"
    assert "the filter removes every item" in baseline_notes(ranks, fitted)["copy_recency"] and baseline_rows(ranks)["copy_recency"] == {}


def test_refused_under_one_plan_only(shop):
    plans = [make_plan(shop, shop.test, p, seen_filter="all_seen", split="test", filtered_target="miss") for p in ("full", "full/none")]
    ranks = rank_baselines(shop, shop.test, plans, ["copy_recency"])
    assert list(baseline_rows(ranks)["copy_recency"])[0] == "HR@1[full/none]"
    assert baseline_notes(ranks, Fitted(shop))["copy_recency"].endswith("(main protocol)")


def test_no_candidate_in_any_history():
    s = rows("1.v 2.v > 6", "3.v 3.c > 7")
    plan = Plan("uni2", "uni2", None, np.array([[8, 9], [8, 9]], np.int32)[:, :1], np.full(2, 2, np.int32))
    s = replace(s, items=np.append(s.items, ["8", "9"]))
    ranks = rank_baselines(s, s.test, [plan], ["copy_recency", "pop"])
    assert str(ranks["copy_recency"]["uni2"]) == "not applicable: no candidate is an item the rule scores"
    assert counts(ranks["pop"]["uni2"]) == [(0, 1), (0, 1)]


def test_unknown_query_falls_back_and_says_so():
    s = rows("1.v 2.c 2.v > 3", "3.v 2.v 3.v > 1", target_behaviors=())
    fitted = Fitted(s)
    ranks = rank_baselines(s, s.test, [full(s, s.test)], ["pop", "pop_behavior"], fitted=fitted)
    assert counts(ranks["pop"][""]) == counts(ranks["pop_behavior"][""])
    assert "the query behavior is unknown" in baseline_notes(ranks, fitted)["pop_behavior"]


def test_query_behavior_without_train_events():
    s = rows("1.v 2.v > 3", "3.v 2.v 3.v > 1")
    fitted = Fitted(s)
    ranks = rank_baselines(s, s.test, [full(s, s.test)], ["pop", "pop_behavior"], fitted=fitted)
    assert counts(ranks["pop"][""]) == counts(ranks["pop_behavior"][""]) and "cart" in baseline_notes(ranks, fitted)["pop_behavior"]


def test_pop_recent_needs_time_stamps(shop):
    s = rows("1.v 2.v > 3", "3.v 2.v 3.v > 1")
    ranks = rank_baselines(s, s.test, [full(s, s.test)])
    assert "no time stamps" in str(ranks["pop_recent"][""])
    ms = replace(shop, time=shop.time * 1000, unit="ms", train=replace(shop.train, target_time=shop.train.target_time * 1000))
    assert (baselines.pop_recent(Fitted(shop)).base == baselines.pop_recent(Fitted(ms)).base).all()


def test_done_needs_a_thousand_pairs():
    "A behavior whose items never come back is done only where it had a thousand chances."
    line = "{0}.b {1}.c {1}.v > {1}"
    shop_of = lambda n: rows(*[line.format(2 * k % 50 + 1, 2 * k % 50 + 2) for k in range(n)], behaviors=("", "view", "cart", "buy"))
    few, many = shop_of(999), shop_of(1000)
    known = [learn_behaviors(train_events(s), len(s.items), s.n_behaviors) for s in (few, many)]
    assert [k.done.tolist() for k in known] == [[], [3]] and [k.strong for k in known] == [2, 2]
    note = copy_behavior(Fitted(many)).note
    assert note == "strong: cart (1000 of 1000 pairs); done: buy (0 of 1000 pairs)"
    ranks = rank_baselines(many, many.test, [full(many, many.test)], {"with": copy_behavior, "without": partial(copy_behavior, done=False)})
    assert set(counts(ranks["with"][""])) == {(0, 0)}


def test_done_items_below_everything():
    "A bought item ranks under items nobody saw, and all bought ones tie."
    s = rows(*["1.b 2.b 3.v 3.c > 1"] * 1000, "1.v 5.v > 6", behaviors=("", "view", "cart", "buy"))
    r = rank_baselines(s, s.test, [full(s, s.test)], ["copy_behavior"])["copy_behavior"][""]
    assert counts(r)[0] == (4, 1)                       # 3, and 4, 5 and 6 that the row does not hold; beside it the other bought one


def test_learning_leaves_the_target_group_out():
    "A click in the very impression whose like is the target says nothing about what a click leads to."
    s = rows("1.v 2.v 2.c > 1", "3.v 4.v 4.c > 1", "5.c 6.v 5.v > 1")
    known = learn_behaviors(train_events(s), len(s.items), s.n_behaviors)
    assert (known.hits.tolist(), known.pairs.tolist()) == ([0, 2, 1], [0, 5, 1])
    s = replace(s, first=np.array([1, 1, 0, 1, 1, 0, 1, 1, 1], bool))
    known = learn_behaviors(train_events(s), len(s.items), s.n_behaviors)
    assert (known.hits.tolist(), known.pairs.tolist()) == ([0, 0, 1], [0, 3, 1])


def test_prefix_rows_count_early_pairs_again():
    "Where rows are growing prefixes, a pair counts once for each row that holds it; the page says so and leaves it."
    s = rows("1.v 2.v 9.v > 3", "1.v 2.v 3.v 9.v > 3")
    assert Fitted(s).pairs()[1, 2] == 2


def test_empty_history():
    "A case without any input is ranked by what all cases share."
    s = rows("1.v 1.v 2.v > 2", "2.v 1.v > 1")
    bare = replace(s, test=replace(s.test, stop=s.test.start.copy()))
    ranks = rank_baselines(bare, bare.test, [full(bare, bare.test)], ["pop", "markov", "markov_behavior", "item_knn"])
    assert counts(ranks["pop"][""]) == counts(ranks["markov"][""]) == counts(ranks["markov_behavior"][""]) == [(1, 0), (0, 0)]
    assert counts(ranks["item_knn"][""]) == [(0, 1), (0, 1)]


def test_no_cases(shop):
    none = shop.test.take(slice(0, 0))
    assert all(len(r[""]) == 0 for n, r in rank_baselines(shop, none, [full(shop, none)]).items() if not n.startswith("copy"))


# ---- errors ----


def test_masked_target_is_an_error(shop):
    plan = make_plan(shop, shop.test, "full", seen_filter="all_seen", split="test", filtered_target="miss")
    strict = replace(plan, missed=None, fields={})
    with pytest.raises(EvalError, match=r"seen filter of protocol 'full' removes the target of \d+ of \d+ cases"):
        rank_baselines(shop, shop.test, [strict], ["pop"])


def test_unknown_name_is_an_error(shop):
    with pytest.raises(EvalError, match="baseline 'popular' is unknown; valid: random, pop"):
        rank_baselines(shop, shop.test, [full(shop, shop.test)], ["popular"])


def test_item_masked_twice_is_an_error():
    s = rows("1.v 2.v > 3", "1.v 3.v > 2")
    twice = Plan("", "full", (np.array([0, 2, 2]), np.array([1, 1], np.int32)), None, np.array([2, 3], np.int32))
    with pytest.raises(EvalError, match="masked twice"): rank_baselines(s, s.test, [twice], ["copy_recency", "markov", "pop"])


# ---- badges ----


def test_badges(shop):
    plan = full(shop, shop.test)
    ranks = rank_baselines(shop, shop.test, [plan])
    last = replace(ranks["pop"][""], g=np.full(len(shop.test), shop.n_items - 1, np.int32), e=np.zeros(len(shop.test), np.int32))
    lost = badges(last, ranks)
    assert [b.name for b in lost] == ["below copy", "below popularity"] and all(b.model < b.baseline and b.n >= 30 for b in lost)
    assert "repeat cases" in str(lost[0]) and lost[1].slice == "novel"
    perfect = replace(ranks["pop"][""], g=np.zeros(len(shop.test), np.int32), e=np.zeros(len(shop.test), np.int32))
    assert badges(perfect, ranks) == []
    assert badges(last, ranks, least=10**6) == []


def test_badges_see_the_slice_not_the_mean(shop):
    "A model that is right on all repeat cases and lost on the novel ones is above both rules in the mean, and still gets its badge."
    ranks = rank_baselines(shop, shop.test, [full(shop, shop.test)])
    repeat = ranks["pop"][""].repeat
    g = np.where(repeat, 0, shop.n_items - 1).astype(np.int32)
    model = replace(ranks["pop"][""], g=g, e=np.zeros_like(g))
    mean = lambda r: per_case(r, "NDCG", 10).mean()
    assert mean(model) > max(mean(ranks[n][""]) for n in ("pop", "pop_behavior", "pop_recent"))
    assert [b.name for b in badges(model, ranks)] == ["below popularity"]


def test_badges_refuse_other_cases(shop):
    ranks = rank_baselines(shop, shop.test, [full(shop, shop.test)])
    with pytest.raises(EvalError, match="other cases or candidates"): badges(ranks["random"][""].take(slice(0, 400)), ranks)
