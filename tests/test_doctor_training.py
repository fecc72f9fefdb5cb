"""The T checks: rules on planted curves with a clean twin each, and the watch in the loop; the teaching tests stand on the page."""

import copy
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mbnb import datasets
from mbnb.doctor import CHECKS, THRESHOLDS, limits
from mbnb.doctor import training as T
from mbnb.evaluators.metrics import per_case
from mbnb.evaluators.protocols import make_plan
from mbnb.evaluators.ranks import rank_cases
from mbnb.evaluators.stats import standard_error
from mbnb.fit import FitConfig, FitError, FitState, Stage, fit, seed_everything
from mbnb.losses.ce import CE
from mbnb.models.gear import GEAR
from mbnb.models.sasrec import SASRec
from mbnb.sequences import collate

IDS = [f"T{i:02d}" for i in range(1, 18)]
RNG = np.random.default_rng(3)
EVEN = 0.006 * (1 + 0.2 * RNG.random(400))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shop():
    return datasets.load("toyshop-tiny")


def small(shop, seed=0, **changes):
    torch.manual_seed(seed)
    return SASRec(SASRec.Config.small(shop.n_items, d_model=32, n_layers=1, ff_dim=64, **changes))


def batch_of(shop, n=16):
    return collate(shop, shop.train, np.unique(np.linspace(0, len(shop.train) - 1, n).astype(int)), 50)


def watch_of(shop, stages, loss=None, **more):
    cases = collate(shop, shop.valid, np.arange(40), 50)
    return T.Watch(stages=stages, losses={None: loss or CE()}, batch=batch_of(shop), cases=cases, **more)


def judge_of(shop):
    plan = make_plan(shop, shop.valid, "full", seen_filter="none", split="valid")

    def judged(model):
        ndcg = per_case(rank_cases(model.score, shop, shop.valid, [plan], batch_size=256, max_len=50)[plan.name], "NDCG", 10)
        return {"value": float(ndcg.mean()), "error": float(standard_error(ndcg))}

    return judged


def train(shop, model, stages, watch=None, loss=None, state=None, leave_at=None, judged=None, **config):
    "-> (cards, records) of a run on the toy shop; `leave_at`: a step after which the loop is left."
    cards, records = [], []
    judged = judged or (lambda model: {"value": 0.1, "error": 0.01})
    loop = fit(model, {None: loss or CE()}, shop, stages, FitConfig(batch_size=16) if not config else FitConfig(**config), judged, state)
    for r in loop:
        records.append(r)
        if watch:
            cards += watch.step(r, model) if r["kind"] == "step" else watch.epoch(r, model)
        if r["kind"] == "step" and r["step"] == leave_at:
            loop.close()
            break
    return cards, records


def the(cards, id):
    return [c for c in cards if c.id == id][-1]


# ---- every check: a fault and its clean twin ----

CALM = 7 * np.exp(-np.arange(1500) / 200) + 2 + 0.1 * RNG.standard_normal(1500)
SPIKED = np.where(np.arange(1500) == 900, 4.1, CALM)
SLOW = np.where((np.arange(400) >= 200) & (np.arange(400) < 210), 1.0, EVEN)
FALLING = 9 * 0.985 ** np.arange(8)
PLATEAU = 0.5 + 0.1 * np.minimum(np.arange(8), 3)
OVER = [0.2, 0.4, 0.5, 0.47, 0.44, 0.40, 0.36]
VALID_LOSS = [6, 5, 4.5, 4.6, 4.8, 5.1, 5.5]
TABLE = RNG.standard_normal((300, 32))
LISTS = np.stack([RNG.choice(3000, 10, replace=False) + 1 for _ in range(100)])

PAIRS = {
    "T02": (lambda: T.spike(SPIKED), lambda: T.spike(CALM)),
    "T03": (lambda: T.step_time(SLOW), lambda: T.step_time(EVEN)),
    "T04": (lambda: T.noise(0.31, 0.30, 0.015), lambda: T.noise(0.31, 0.20, 0.015)),
    "T05": (lambda: T.loss_down_metric_flat(FALLING, [0.1] * 8, 0.01), lambda: T.loss_down_metric_flat(FALLING, PLATEAU, 0.01)),
    "T06": (lambda: T.overfit(VALID_LOSS, OVER, 0.01), lambda: T.overfit(None, np.arange(8) * 0.1, 0.01)),
    "T07": (lambda: T.below_rule(0.01, {"pop": 0.02}, 10, 50), lambda: T.below_rule(0.03, {"pop": 0.02}, 10, 50)),
    "T08": (lambda: T.auxiliary({"aux": 3.1}, {"aux": 0.1}), lambda: T.auxiliary({"aux": 0.4}, {"aux": 0.1})),
    "T09": (lambda: T.dead({"a": [0.0] * 3, "b": [1e-3] * 3}, [1, 100, 210]), lambda: T.dead({"b": [1e-3] * 3}, [1, 100, 210])),
    "T10": (lambda: T.update_ratio({"a": [3e-6]}), lambda: T.update_ratio({"a": [3e-3]})),
    "T11": (lambda: T.experts([71, 4, 4, 4, 4, 4, 3, 3, 3]), lambda: T.experts([30, 25, 25, 20])),
    "T12": (lambda: T.embedding_collapse(TABLE * 0.2 + 1), lambda: T.embedding_collapse(TABLE)),
    "T13": (lambda: T.popularity_collapse(LISTS % 9 + 1, 3000), lambda: T.popularity_collapse(LISTS, 3000)),
    "T14": (lambda: T.patience_clock(7, 18, 44, 100), lambda: T.patience_clock(18, 18, 0, 100)),
    "T15": (lambda: T.loader(46, 100), lambda: T.loader(3, 100)),
    "T16": (lambda: T.memory(15, 16), lambda: T.memory(8, 16)),
    "T17": (lambda: T.undertrained(np.arange(9) * 0.1, 0.01), lambda: T.undertrained([0.1, 0.5, 0.6, 0.58, 0.6, 0.59], 0.02)),
}
GRAVE = {"T03": "E"} | dict.fromkeys(("T04", "T10", "T14", "T15"), "I")


@pytest.mark.parametrize("id", PAIRS)
def test_a_fault_and_its_clean_twin(id):
    fault, clean = (f() for f in PAIRS[id])
    assert (fault.id, fault.severity) == (id, GRAVE.get(id, "W")) and fault.fix.endswith(".") and not fault.message.endswith(".")
    assert (clean.id, clean.severity) == (id, "ok")


def test_without_input_a_check_is_skipped_never_fine():
    nothing = [T.spike([]), T.step_time([]), T.noise(1, 1, math.nan), T.loss_down_metric_flat([], [], 0.1), T.overfit(None, [])]
    nothing += [T.below_rule(1, {}, 9, 9)]
    nothing += [T.auxiliary({}, {}), T.dead({}, []), T.update_ratio({}), T.experts([]), T.embedding_collapse(np.zeros((0, 4)))]
    nothing += [T.popularity_collapse(np.zeros((0, 10)), 100), T.loader(0, 0), T.memory(0, 0), T.undertrained([], 0.1)]
    assert {c.severity for c in nothing} == {"skipped"}
    assert [c.severity for c in T.check_training([]) if c.id != "T01"] == ["skipped"] * 16


# ---- T02 ----


def test_plain_noise_of_many_steps_is_no_spike():
    assert T.spike(2 + 0.1 * np.random.default_rng(0).standard_normal(30_000)).severity == "ok"


def test_spikes_in_a_first_steep_stretch_and_in_a_still_loss():
    steep = 9 * np.exp(-np.arange(60) / 15) + 1
    assert T.spike(steep).severity == "ok" and T.spike(np.append(steep, 20)).severity == "W"
    assert T.spike(np.ones(200)).severity == "ok" and T.spike(np.zeros(200)).severity == "ok"
    assert "1 of 201" in T.spike(np.append(np.ones(200), 1.5)).message


def test_a_level_that_stays_is_told_once_and_counted_a_few_times():
    jump = np.concatenate([np.ones(200) + 0.01 * RNG.random(200), 3 + 0.01 * RNG.random(400)])
    spikes = T.Spikes()
    for i, loss in enumerate(jump):
        spikes.see(loss, 1, i)
    assert 1 <= spikes.count <= 60


# ---- T03 and F16: one step of 30 s, and why ----


@pytest.mark.parametrize(
    ("clue", "words"),
    [
        ({"cpu": 0.006}, "other processes took the processor"),
        ({"cpu": 0.006, "wait": 29.0}, "waiting for data"),
        ({"cpu": 0.006, "slept": 29.9}, "suspended"),
        ({"cpu": 0.5, "faults": 20_000}, "swapping"),
        ({"cpu": 0.5, "swapped": 90_000}, "swapping"),
        ({"cpu": 29.9}, "own work"),
    ],
)
def test_a_step_of_thirty_seconds_names_its_cause(clue, words):
    seconds = EVEN.copy()
    seconds[250] = 30.0
    card = T.step_time(seconds, clues=[{"cpu": 0.006} if i != 250 else clue for i in range(400)])
    assert card.severity == "W" and "step 251 took 30 s" in card.message and words in card.message


def test_projection_comes_from_the_median_and_is_never_negative():
    seconds = np.append(EVEN, 7287.0)
    assert T.eta(seconds, 1000)[0] < 10 < np.mean(seconds) * 1000
    assert T.eta(seconds, -5) == (0, 0, 0) and T.eta([-3.0, -1.0], 10)[0] == 0 and math.isnan(T.eta([], 5)[0])


def test_slow_steps_that_lose_nothing_are_no_finding():
    assert T.step_time(np.where(np.arange(400) >= 200, 0.03, EVEN)).severity == "ok"
    assert T.step_time(np.where(np.arange(400) >= 200, 2.0, EVEN)).severity == "E"
    assert T.step_time(np.where(np.arange(400) >= 200, 4.0, EVEN + 1)).severity == "W"


def test_a_clock_that_is_set_is_no_sleep(shop, monkeypatch):
    real, jump = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    watch, record = T.Watch(), {"stage": "fit", "epoch": 0, "loss": 2.0, "rows": 16, "seconds": 0.01, "wait": 0.0}
    for i in range(80):
        jump[0] = 86_400.0 * (i >= 40) - 90_000.0 * (i >= 60)
        watch.step(record | {"step": i + 1}, nn.Linear(1, 1))
    assert the(watch.finish(), "T03").severity == "ok" if hasattr(time, "CLOCK_BOOTTIME") else True


def test_a_suspended_machine_is_told(monkeypatch):
    asleep = [0.0]
    monkeypatch.setattr(T, "_slept", lambda: asleep[0])
    watch, cards, record = T.Watch(), [], {"stage": "fit", "epoch": 0, "loss": 2.0, "rows": 16, "seconds": 0.01, "wait": 0.0}
    for i in range(80):
        asleep[0] = 3600.0 * (i >= 40)
        cards += watch.step(record | {"step": i + 1}, nn.Linear(1, 1))
    assert [c.id for c in cards] == ["T03"] and "suspended for 3,600 s before step 41" in cards[0].message


def test_a_sleep_in_a_step_of_a_run(shop, monkeypatch):
    "F16, with 1.5 s in place of 30."

    def sleepy(prediction, rng):
        calls[0] += 1
        if calls[0] == 30:
            time.sleep(1.5)
        return CE()(prediction)

    calls, stage = [0], Stage(epochs=4, patience=0)
    watch = watch_of(shop, [stage])
    pace = T.Pace(watch.limits | {"T03.single": 1.0}, alike=False)
    monkeypatch.setattr(T, "Pace", lambda *args, **more: copy.deepcopy(pace))
    cards, _ = train(shop, small(shop), [stage], watch, sleepy)
    assert "T03" in {c.id for c in cards} and "step 30 took" in the(cards, "T03").message and "did not compute" in the(cards, "T03").message


# ---- T08, by hand and against one backward pass ----


def test_gradients_of_terms_are_those_of_backward(shop):
    model = small(shop, dropout=0.0)
    p = model(batch_of(shop))
    terms = {"main": CE()(p), "size": 0.1 * model.items.weight.square().sum()}
    found = T.gradient_terms(terms, model.parameters())
    lengths, grads = {}, {}
    for k, v in terms.items():
        model.zero_grad()
        v.backward(retain_graph=True)
        grads[k] = model.items.weight.grad.clone()
        lengths[k] = math.sqrt(sum(float(q.grad.square().sum()) for q in model.parameters() if q.grad is not None))
    assert found["norm"] == pytest.approx(lengths, rel=1e-4)
    assert found["ratio"]["size"] == pytest.approx(float(grads["size"].norm() / grads["main"].norm()), rel=1e-4)
    cosine = torch.cosine_similarity(grads["size"].flatten(), grads["main"].flatten(), 0)
    assert found["cosine"]["size"] == pytest.approx(float(cosine), abs=1e-4)


# ---- the watch in the loop ----


def test_a_plain_run_has_no_finding_that_is_not_true(shop):
    stage = Stage(epochs=25, patience=5)
    watch, model = watch_of(shop, [stage], config=FitConfig(batch_size=16)), small(shop)
    cards, records = train(shop, model, [stage], watch, judged=judge_of(shop))
    cards += watch.finish(model)
    final = {c.id: c for c in cards}
    ended = "patience" in records[-1].get("ends", "")
    assert sorted(final) == IDS and {c.id for c in final.values() if c.severity in "EW"} <= (set() if ended else {"T17"})
    assert all(c.title == CHECKS[c.id][0] for c in final.values())
    assert {"update", "items"} <= {k for p in watch.take() for k in p}


def test_lr_zero_moves_nothing(shop):
    "F26."
    stage = Stage(epochs=18, patience=0, lr=0.0)
    cards, _ = train(shop, small(shop), [stage], watch_of(shop, [stage], share=0.5))
    card = the(cards, "T09")
    assert card.severity == "W" and "10 of 10 modules do not move" in card.message and card.threshold == THRESHOLDS["T09.ratio"]


def test_lr_of_a_million(shop):
    "F26: the loop refuses a loss that is no number before the weights have seen it, and T01 says so."
    stage = Stage(epochs=3, patience=0, lr=1e6)
    watch, model = watch_of(shop, [stage]), small(shop)
    with pytest.raises(FitError, match="weights are unchanged") as refused:
        train(shop, model, [stage], watch)
    card = T.nonfinite("nan", "the loss", [76, 142], step=watch.steps + 1, lr=1e6)
    assert "nan" in str(refused.value) and all(p.isfinite().all() for p in model.parameters())
    assert card.severity == "E" and "on cases 76, 142" in card.message and card.patch == {"lr": 5e5}


def test_a_loss_that_explodes(shop):
    stage = Stage(epochs=2, patience=0, lr=1e2)
    watch = watch_of(shop, [stage])
    cards, _ = train(shop, small(shop), [stage], watch)
    assert the(cards, "T02").severity == "W" and the(watch.finish(), "T10").severity == "I"


def test_a_broken_weight_is_named(shop):
    "F20: what got past the loss is seen in the weights."
    model, stage = small(shop), Stage(epochs=1, patience=0)
    watch = watch_of(shop, [stage])
    record = {"kind": "step", "stage": "fit", "epoch": 0, "loss": 2.0, "rows": 16, "seconds": 0.01, "wait": 0.0, "lr": 1e-3}
    for i in range(3):
        assert not watch.step(record | {"step": i + 1}, model)
    with torch.no_grad():
        model.blocks[0].up.weight[0, 0] = math.nan
    (card,) = watch.step(record | {"step": 4}, model)
    assert card.id == "T01" and card.severity == "E" and "blocks.0.up" in card.message and "step 4" in card.message
    assert [c.id for c in watch.step(record | {"step": 5, "loss": math.nan}, model)] == []  # told once
    watch.finish()
    assert watch.told["T01"] == card


class Drawing(SASRec):
    "SASRec that draws from every generator there is, keeps a buffer, and has a second term."

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(1))
        self.norm = nn.BatchNorm1d(config.d_model)

    def forward(self, batch):
        import random

        p = super().forward(batch)
        self.calls += 1
        states = self.norm(p.states) * (1 + 0.01 * random.random() + 0.01 * np.random.random() + 0.01 * torch.rand(1))
        aux = {"size": p.table.square().mean() * self.calls.clamp(max=1).mean()}
        return replace(p, states=states, aux=aux)


def drawing(shop):
    torch.manual_seed(0)
    return Drawing(SASRec.Config.small(shop.n_items, d_model=32, n_layers=1, ff_dim=64))


def test_a_watched_run_ends_with_the_same_bits(shop):
    stage, ends = Stage(epochs=4, patience=0, loss_weights={"size": 0.5}), []
    for share in (None, 1.0):
        np.random.seed(0)
        model = drawing(shop)
        watch = watch_of(shop, [stage], share=share) if share else None
        _, records = train(shop, model, [stage], watch)
        if share:
            assert {"update", "gradient", "items"} <= {k for p in watch.take() for k in p}
        ends.append((model.state_dict(), [r["loss"] for r in records if r["kind"] == "step"], torch.get_rng_state()))
    (a, losses, rng), (b, watched_losses, watched_rng) = ends
    assert all(torch.equal(a[k], b[k]) for k in a) and losses == watched_losses and torch.equal(rng, watched_rng)


def test_a_resumed_watched_run_ends_with_the_same_bits(shop):
    stage = Stage(epochs=3, patience=0)
    whole = small(shop)
    train(shop, whole, [stage], state=FitState(seed_everything(0)))
    model = small(shop)
    state = FitState(seed_everything(0))
    _, records = train(shop, model, [stage], watch_of(shop, [stage], share=1.0), state=state, leave_at=20)
    again = small(shop)
    again.load_state_dict(model.state_dict())
    watch = watch_of(shop, [stage], share=1.0)
    watch.replay(records)
    assert watch.steps == 20
    train(shop, again, [stage], watch, state=state)
    assert all(torch.equal(whole.state_dict()[k], again.state_dict()[k]) for k in whole.state_dict())


def test_turns_and_frozen_parts_are_not_dead(shop):
    soon = limits(**{"T09.steps": 60})
    turns = Stage(epochs=13, patience=0, train=(("items", "position"), ("blocks", "embed_norm", "final_norm")))
    cards, _ = train(shop, small(shop), [turns], watch_of(shop, [turns], limits=soon, share=0.5))
    assert "T09" not in {c.id for c in cards}
    frozen = Stage(epochs=13, patience=0, freeze=("position",))
    watch = watch_of(shop, [frozen], limits=soon, share=0.5)
    train(shop, small(shop), [frozen], watch)
    assert "position" not in watch.updates[1] and the(watch.finish(), "T09").severity == "ok"


def test_a_schedule_that_ends_at_nothing_is_not_dead(shop):
    stage = Stage(epochs=13, patience=0, schedule="linear")
    watch = watch_of(shop, [stage], limits=limits(**{"T09.steps": 60}), share=0.5)
    cards, _ = train(shop, small(shop), [stage], watch)
    assert "T09" not in {c.id for c in cards}


def test_aux_terms_of_a_model_are_weighed(shop):
    torch.manual_seed(0)
    stage = Stage(epochs=3, patience=0, loss_weights={"main": 1.0, "behavior": 1e3})
    model = GEAR(GEAR.Config.small(shop.n_items, shop.n_behaviors))
    watch = watch_of(shop, [stage], share=1.0)
    train(shop, model, [stage], watch)
    card = the(watch.finish(), "T08")
    assert card.severity == "W" and "behavior has" in card.message
    stage = replace(stage, loss_weights={"main": 1.0, "behavior": 0.01})
    watch = watch_of(shop, [stage], share=1.0)
    train(shop, model, [stage], watch)
    assert the(watch.finish(), "T08").severity == "ok"


def test_lists_and_vectors_that_collapsed_are_seen_in_the_model(shop):
    stage, model = Stage(epochs=1, patience=0), small(shop)
    with torch.no_grad():
        model.items.weight[1:] = model.items.weight[1:] * 0.05 + 1
    watch = watch_of(shop, [stage])
    record = {"stage": "fit", "epoch": 0, "best_epoch": 0, "step": 9, "value": 0.1, "error": 0.01, "loss": 3.0}
    assert "T12" in {c.id for c in watch.epoch(record, model)}
    assert watch_of(shop, [stage]).epoch(record, small(shop)) == []


def test_the_worse_replaces_and_nothing_is_told_twice():
    watch, record = T.Watch(), {"stage": "fit", "epoch": 0, "loss": 2.0, "rows": 16, "wait": 0.0, "slots": 640}
    cards = []
    for i in range(140):
        cards += watch.step(record | {"step": i + 1, "seconds": 1.0 if i < 60 else 4.5 if i < 100 else 14.0})
    assert [c.severity for c in cards if c.id == "T03"] == ["W", "E"]
    watch.finish()
    assert watch.told["T03"].severity == "E" and sorted(watch.told) == IDS and not watch.finish()


def test_epochs_tell_in_time(shop):
    stage = Stage(epochs=20, patience=0)
    watch, told = T.Watch(stages=[stage], rules={"pop": 0.2}), []
    for e in range(-1, 20):
        record = {"stage": "fit", "epoch": e, "step": e * 9, "best_epoch": e, "value": 0.1 + 0.001 * (e % 2), "error": 0.01}
        if e >= 0:
            record |= {"loss": 9 * 0.98**e, "train_seconds": 2.0, "eval_seconds": 1.0}
        told += [(c.id, e) for c in watch.epoch(record)]
    assert told == [("T07", 3), ("T05", 4)]
    final = {c.id: c for c in watch.finish()} | {}
    assert final["T14"].severity == "I" and final["T06"].message.startswith("plateau") and final["T04"].severity == "I"
    passed = T.Watch(stages=[stage], rules={"pop": 0.2})
    for e in range(20):
        passed.epoch({"stage": "fit", "epoch": e, "step": e, "best_epoch": e, "value": 0.1 + 0.01 * e, "error": 0.001, "loss": 3.0})
    assert passed.told["T07"].severity == "W" and the(passed.finish(), "T07").severity == "ok"  # it was, and is no longer


def test_epochs_that_are_made_again_count_once():
    watch = T.Watch()
    for e in (0, 1, 2, 3, 1, 2):
        watch.epoch({"stage": "fit", "epoch": e, "step": e, "best_epoch": e, "value": 0.1 * e, "error": 0.01, "loss": 3.0})
    assert [x["epoch"] for x in watch.epochs] == [0, 1, 2]


def test_a_finished_run_is_judged_from_its_lines():
    lines = [{"kind": "rules", "table": {"pop": {"NDCG@10": 0.3}, "oracle": {"NDCG@10": 0.9}}}]
    for e in range(8):
        step = {"kind": "step", "stage": "fit", "epoch": e, "loss": 3.0 - 0.1 * e, "rows": 64, "lr": 1e-3, "seconds": 0.1, "wait": 0.05}
        lines += [step | {"step": e * 20 + i + 1} for i in range(20)]
        row = {"value": 0.1 * min(e, 2), "error": 0.01, "loss": 3.0 - 0.1 * e, "best_epoch": 2, "train_seconds": 2.0, "eval_seconds": 1.0}
        lines.append({"kind": "epoch", "stage": "fit", "epoch": e, "step": e * 20 + 20} | row)
    cards = {c.id: c for c in T.check_training(json.loads(json.dumps(lines)), [Stage(epochs=8)])}
    assert sorted(cards) == IDS
    assert cards["T07"].severity == "W" and "rule pop" in cards["T07"].message
    assert cards["T15"].severity == "I" and "50%" in cards["T15"].message
    assert cards["T14"].message.startswith("best epoch 2, 15.0 s and 5 epochs") and cards["T05"].severity == cards["T02"].severity == "ok"


def test_the_watch_is_cheap(shop):
    "The looks stay under their share, whatever they cost; a cheap step stays far under a millisecond on any machine."
    stage = Stage(epochs=8, patience=0)
    watch = watch_of(shop, [stage])
    train(shop, small(shop), [stage], watch)
    assert watch.spent["update"] <= watch.share / 3 * watch.train + 0.05
    record = {"stage": "fit", "epoch": 0, "loss": 2.0, "rows": 16, "seconds": 0.01, "wait": 0.0, "lr": 1e-3}
    watch, model = T.Watch(), nn.Linear(1, 1)
    watch.due["update"] = math.inf
    begun = time.process_time()
    for i in range(2000):
        watch.step(record | {"step": i + 1}, model)
    assert (time.process_time() - begun) / 2000 < 2e-4
