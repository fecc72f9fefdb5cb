"""GEAR: what its states may see, odd data, and the two forms; the teaching tests stand on its page."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from mbnb import datasets
from mbnb.checks import awake, build, check_model, random_batch, widen
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import rank_cases
from mbnb.events import GEAR_LOG, from_frame, read_events
from mbnb.fit import FitConfig, Stage, fit, objective, partition
from mbnb.losses.ce import CE
from mbnb.models.gear import GEAR, Config, as_steps, window
from mbnb.repeat import losses_of
from mbnb.sequences import collate, from_events

HEADS = ("softmax", "repeat")
WEIGHTS = {"main": 1.0, "behavior": 0.1}


@pytest.fixture(scope="module")
def shop():
    return datasets.load("toyshop-tiny")


def model_of(n_items=40, n_behaviors=3, **changes):
    return awake(build(GEAR, n_items, n_behaviors, **changes)).eval()


def slots(model, batch):
    asked = torch.cat([batch.behavior_seq, batch.target_behavior[:, None]], 1)
    with torch.no_grad():
        return model.slots(batch.item_seq, asked, as_steps(batch).time)


def gap(a, b):
    keep = a.isfinite()
    assert torch.equal(keep, b.isfinite())
    return float((a[keep] - b[keep]).detach().abs().max())


@torch.no_grad()
def scores(model, batch):
    return model.score(batch)


@pytest.mark.parametrize("form", ("published", "masked"))
@pytest.mark.parametrize("key, slot", [("item_seq", 7), ("behavior_seq", 6), ("time_seq", 6)])
def test_causality_of_both_kinds_of_slot(form, key, slot):
    "A change at step 4 (slots 6 and 7) moves nothing before it; an event's time is known from the next step on."
    model, batch = model_of(form=form), random_batch(40, full=True)
    other = getattr(batch, key).clone()
    other[:, 3] += 1 if key != "time_seq" else 86_400
    other = other % 4 if key == "behavior_seq" else other
    other[:, 3].clamp_(min=1)
    moved = (slots(model, batch) - slots(model, replace(batch, **{key: other}))).abs().amax((0, 2)) > 1e-6
    first = int(moved.nonzero()[0])
    assert first == (slot if key != "time_seq" else 8)


def test_when_the_target_happens():
    "Known under the published clock only, where every step knows its own time, and then to the last slot alone."
    batch = random_batch(40, full=True)
    late = replace(batch, target_time=batch.target_time + 86_400)
    for clock, moved in (("last", []), ("target", [14])):
        model = model_of(query_time=clock)
        assert ((slots(model, batch) - slots(model, late)).abs().amax((0, 2)) > 1e-6).nonzero()[:, 0].tolist() == moved


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("asked", ("given", "mixed"))
def test_padding(head, asked):
    model, batch = model_of(head=head, query_behavior=asked), random_batch(40)
    assert gap(scores(model, batch), scores(model, widen(batch, 20))) < 1e-4
    a, b = model(batch), model(widen(batch, 20))
    assert torch.equal(a.targets, b.targets) and gap(a.states, b.states) < 1e-4 and abs(a.aux["behavior"] - b.aux["behavior"]) < 1e-5
    assert torch.isneginf(scores(model, batch)[:, 0]).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", ("published", "masked"))
def test_empty_history(head, form):
    model, batch = model_of(head=head, form=form), random_batch(40)
    empty = replace(batch, **{k: torch.zeros_like(getattr(batch, k)) for k in ("item_seq", "behavior_seq", "time_seq", "length")})
    assert scores(model, empty)[:, 1:].isfinite().all()
    p = model.train()(empty)
    assert p.targets.tolist() == batch.target.tolist(), "the asked behavior alone is still a question"
    total, _ = objective(p, CE(), WEIGHTS, None)
    total.backward()
    assert all(q.grad is None or q.grad.isfinite().all() for q in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_unseen_length(head):
    "The newest max_len events are read, whatever the width of the batch; a longer model reads them all."
    model, batch = model_of(head=head, max_len=5), random_batch(40, L=12, full=True)
    newest = replace(batch, **{k: getattr(batch, k)[:, -5:] for k in ("item_seq", "behavior_seq", "time_seq")})
    assert gap(scores(model, batch), scores(model, newest)) < 1e-5
    longer = GEAR(replace(model.config, max_len=300)).eval()
    longer.load_state_dict(model.state_dict())
    assert gap(scores(longer, newest), scores(model, newest)) < 1e-5
    assert scores(longer, random_batch(40, L=290, full=True))[:, 1:].isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("C", (1, 9))
def test_one_behavior_and_nine(head, C):
    model, batch = model_of(n_behaviors=C, head=head), random_batch(40, C, full=True)
    assert scores(model, batch).shape == (6, 41)
    p = model(batch)
    assert p.aux["behavior"] == 0 if C == 1 else p.aux["behavior"] > 0
    given = GEAR(replace(model.config, query_behavior="given")).eval()
    given.load_state_dict(model.state_dict() | {"given": torch.tensor(True)})
    same = gap(scores(model, batch)[:, 1:], scores(given, batch)[:, 1:].log_softmax(1)) < 1e-4
    assert same == (C == 1), "with one behavior there is nothing to mix"


def test_behaviors_in_another_order():
    "Behaviors are names: numbered otherwise, with their vectors moved along, they give the same scores."
    model, other, batch = model_of(), model_of(), random_batch(40)
    order = torch.tensor([0, 3, 1, 2])
    with torch.no_grad():
        other.behaviors.weight[order] = model.behaviors.weight.clone()
    renamed = replace(batch, behavior_seq=order[batch.behavior_seq], target_behavior=order[batch.target_behavior])
    assert gap(scores(model, batch), scores(other, renamed)) < 1e-5
    assert gap(scores(model, batch), scores(model, renamed)) > 1e-3


def test_time_unit():
    "The same log in seconds and in milliseconds gives the same scores, once `prepare` has said so."
    rng = np.random.default_rng(0)
    n = 400
    when = np.sort(rng.integers(1_511_539_217, 1_511_939_217, n))
    log = pl.DataFrame(
        {
            "user": [f"u{k}" for k in rng.integers(0, 20, n)],
            "item": [f"i{k}" for k in rng.integers(0, 30, n)],
            "behavior": rng.choice(["view", "buy"], n),
            "timestamp": when,
        }
    )
    found = []
    for frame, unit in ((log, "s"), (log.with_columns(pl.col("timestamp") * 1000), "ms")):
        s = from_events(from_frame(frame, unit=unit), name="clock")
        model = model_of(s.n_items, s.n_behaviors, head="repeat")
        model.prepare(s)
        assert s.unit == unit and float(model.per_second) == {"s": 1, "ms": 1000}[unit]
        found.append(scores(model, collate(s, s.test, np.arange(len(s.test)), 49)))
    assert gap(*found) < 1e-4


def test_order_only_counts_events():
    "Without time stamps the bias counts steps, so what the order's numbers are does not matter."
    s = datasets.load("toyshop-tiny")
    model = model_of(s.n_items, s.n_behaviors)
    model.prepare(replace(s, unit="order"))
    batch = collate(s, s.test, np.arange(8), 49)
    assert gap(scores(model, batch), scores(model, replace(batch, time_seq=batch.time_seq * 7))) == 0
    assert gap(scores(model, batch), scores(model, widen(batch, 9))) < 1e-4


def test_unit_travels_with_the_weights(shop):
    model = model_of(shop.n_items, shop.n_behaviors)
    model.prepare(replace(shop, unit="ms", target_behaviors=(3,)))
    fresh = build(GEAR, shop.n_items, shop.n_behaviors)
    fresh.load_state_dict(model.state_dict())
    assert float(fresh.per_second) == 1000 and bool(fresh.given)


def test_given_reads_the_asked_behavior_and_nothing_else_of_the_target():
    model, batch = model_of(query_behavior="given"), random_batch(40)
    other = replace(batch, target=batch.target % 40 + 1, target_time=batch.target_time + 999)
    assert gap(scores(model, batch), scores(model, other)) == 0
    assert gap(scores(model, batch), scores(model, replace(batch, target_behavior=batch.target_behavior % 3 + 1))) > 1e-3
    check_model(GEAR, CE(), weights=WEIGHTS, query_behavior="given", skip=("future_does_not_leak", "overfits_one_batch"))


def test_repeat_head_conforms_and_takes_ce_only():
    check_model(GEAR, CE(), weights=WEIGHTS, head="repeat")
    assert losses_of(GEAR.losses, "repeat") == ("ce",) and "bpr" in GEAR.losses
    model, batch = model_of(head="repeat"), random_batch(40)
    p = model(batch)
    assert p.copy.shape == (len(p.targets), 2)
    assert scores(model, batch)[:, 1:].exp().sum(1) == pytest.approx(torch.ones(6), abs=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_merged_layout(head):
    "One slot a step keeps the rules: nothing later is seen, pads do nothing, and the newest item is at hand."
    check_model(GEAR, CE(), weights=WEIGHTS, layout="merged", head=head)
    model, batch = model_of(layout="merged", head=head), random_batch(40, full=True)
    later = batch.item_seq.clone()
    later[:, 3] = later[:, 3] % 40 + 1
    moved = (slots(model, batch) - slots(model, replace(batch, item_seq=later))).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == list(range(7, 15))


def test_random_window_reaches_old_events_in_training_only(shop):
    model = build(GEAR, shop.n_items, shop.n_behaviors, max_len=9, random_window_prob=1.0, dropout=0.0)
    long = int(shop.train.length.argmax())
    batch = collate(shop, shop.train, np.array([long] * 64), model.train_len)
    assert batch.item_seq.shape[1] == shop.train.length[long] > 9
    torch.manual_seed(0)
    drawn = model.train()(batch).targets.view(64, 10)
    newest = model.eval()(batch).targets.view(64, 10)
    whole = as_steps(batch).item[0].tolist()
    assert (newest == torch.tensor(whole[-10:])).all() and len({tuple(r) for r in drawn.tolist()}) > 5
    runs = {tuple(whole[k : k + 10]) for k in range(len(whole) - 9)}
    assert all(tuple(r) in runs for r in drawn.tolist())
    assert build(GEAR, random_window_prob=0.0).train_len == Config(1, 1).max_len


def test_window_of_random_rows_loses_no_event():
    steps = as_steps(random_batch(40, B=50, L=7))
    for share in (0.0, 1.0):
        cut = window(steps, 4, share)
        assert ((cut.item > 0).sum(1) == (steps.item > 0).sum(1).clamp(max=4)).all()


def test_label_masks(shop):
    "Growing prefixes ask for their target only."
    batch = collate(replace(shop, labels="last"), shop.train, np.arange(5), 20)
    p = build(GEAR, shop.n_items, shop.n_behaviors).eval()(batch)
    assert p.targets.tolist() == batch.target.tolist()
    assert (as_steps(collate(shop, shop.train, np.arange(5), 20)).label > 0).all()


def test_id_map_stable(tmp_path):
    "A log in another order of rows and users has the same ids, whatever the seed of Python's hashes."
    rng, files = np.random.default_rng(3), []
    rows = [
        f"{u}\t{rng.integers(1, 9)}\t{rng.choice(['view', 'buy'])}\t{1_511_539_217 + 60 * k}" for k, u in enumerate(rng.integers(1, 7, 90))
    ]
    for name, order in (("a", np.arange(90)), ("b", rng.permutation(90))):
        (tmp_path / name).write_text("\n".join(rows[k] for k in order))
        files.append(from_events(read_events(tmp_path / name, **GEAR_LOG), name="mini", target="buy"))
    a, b = files
    assert a.data_hash == b.data_hash and a.split_hash == b.split_hash
    assert a.behaviors == b.behaviors == ("", "buy", "view") and a.items.tolist() == sorted(a.items.tolist())


def test_mean_over_cases(shop):
    "A metric is the mean over cases: a last batch of a few counts as a few."
    model = model_of(shop.n_items, shop.n_behaviors)
    plan = make_plan(shop, shop.test, "full", seen_filter="none", split="test")
    rank = lambda size: per_case(rank_cases(model.score, shop, shop.test, [plan], batch_size=size, max_len=49)[plan.name], "NDCG", 10)
    with torch.no_grad():
        whole, parts = rank(200), rank(128)
    assert parts == pytest.approx(whole, abs=1e-6) and len(parts) == len(shop.test)
    of_batches = np.mean([parts[:128].mean(), parts[128:].mean()])
    assert abs(of_batches - parts.mean()) > 1e-6, "the mean of batch means is another number"


@pytest.mark.parametrize("preset", GEAR.PRESETS)
def test_presets_and_stage(preset):
    model = build(GEAR, preset=preset)
    stage = Stage(**GEAR.PRESETS[preset]["stages"][0])
    assert set(partition(model, stage).values()) == {0}
    assert stage.loss_weights == WEIGHTS and stage.weight_decay == 1e-6
    assert (stage.epochs, stage.patience) == ((400, 75) if preset == "small" else (1000, 30))
    c = model.config
    assert (c.d_model, c.n_layers, c.dropout) == {"published": (32, 4, 0.2), "yelp": (16, 2, 0.1), "small": (32, 2, 0.2)}[preset]
    assert c.form == ("masked" if preset == "small" else "published")


@pytest.mark.parametrize("change", ({"time_bias": False}, {"head": "repeat"}, {"form": "published"}), ids=str)
def test_trains(shop, change):
    "Two epochs lower both losses, in mixed precision too."
    model = build(GEAR, shop.n_items, shop.n_behaviors, max_len=19, **change)
    model.prepare(shop)
    stage = Stage(**GEAR.STAGE | {"epochs": 2, "lr": 5e-3})
    seen = []
    for precision in ("32", "bf16"):
        run = fit(
            model,
            {None: CE()},
            shop,
            [stage],
            FitConfig(batch_size=32, threads=1, precision=precision),
            lambda m: {"value": 0.0, "error": 0.0, "metrics": {}},
        )
        steps = [r for r in run if r["kind"] == "step"]
        seen += [steps[0]["terms"], steps[-1]["terms"]]
    for term in ("main", "behavior"):
        assert np.isfinite([t[term] for t in seen]).all()
        assert seen[1][term] < seen[0][term]
