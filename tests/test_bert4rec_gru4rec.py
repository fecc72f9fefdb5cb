"""BERT4Rec and GRU4Rec against slow versions, and the mistakes that both are known for."""
from dataclasses import replace

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from mbnb.checks import awake, build, random_batch, widen
from mbnb.events import Events
from mbnb.fit import Stage, partition
from mbnb.losses.ce import CE
from mbnb.models.bert4rec import BERT4Rec, holes
from mbnb.models.gru4rec import GRU4Rec
from mbnb.sequences import collate, from_events

BOTH = pytest.mark.parametrize("cls", [BERT4Rec, GRU4Rec])


def longer(batch, more):
    "The same cases with `more` older events before each row's oldest, all columns full."
    g = torch.Generator().manual_seed(5)
    front = torch.randint(1, 41, (len(batch), more), generator=g)
    return replace(batch, item_seq=torch.cat([front, batch.item_seq], 1), behavior_seq=torch.cat([front * 0 + 1, batch.behavior_seq], 1),
                   time_seq=torch.cat([front * 0, batch.time_seq], 1), length=batch.length + more)


# ---- both ----

@BOTH
def test_padding_invariance_to_the_row(cls):
    "Each row scores alone as it does beside longer ones, with any number of pads in front."
    model, batch = awake(build(cls)), random_batch(40, B=5, L=9)
    with torch.no_grad():
        z = model.score(batch)
        for b in range(5):
            n = int(batch.length[b])
            one = replace(batch, **{k: getattr(batch, k)[b:b + 1, -n:] for k in ("item_seq", "behavior_seq", "time_seq")},
                          **{k: getattr(batch, k)[b:b + 1] for k in ("length", "user", "target", "target_behavior", "target_time", "case")})
            assert float((model.score(widen(one, b)) - z[b])[:, 1:].abs().max()) <= 1e-4


@BOTH
def test_events_beyond_max_len_are_not_read(cls):
    model, batch = awake(build(cls, max_len=6)), random_batch(40, L=6, full=True)
    with torch.no_grad(): assert torch.equal(model.score(batch), model.score(longer(batch, 4)))
    assert len(model(longer(batch, 4)).targets) <= 6 * 7


@BOTH
def test_all_pad_row_is_finite_and_trains(cls):
    model, batch = build(cls), random_batch(40)
    item = batch.item_seq.clone(); item[0] = 0
    batch = replace(batch, item_seq=item)
    CE()(model.train()(batch)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    empty = replace(batch, item_seq=item * 0)
    CE()(model(empty)).backward()                          # no lesson, or the target's alone
    assert model.eval().score(empty)[:, 1:].isfinite().all()


@BOTH
def test_pad_and_mask_are_no_candidates(cls):
    model, batch = awake(build(cls)), random_batch(40)
    p, z = model(batch), model.score(batch)
    assert p.table.shape[0] == 41 == z.shape[1] and (p.bias is None or len(p.bias) == 41) and (z[:, 0] == -torch.inf).all()
    ids, _ = model.recommend(batch, 40)
    assert all(sorted(r) == list(range(1, 41)) for r in ids.tolist())


@BOTH
@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_runs_in_half_precision(cls, precision):
    model, batch = build(cls), random_batch(40)
    with torch.autocast("cpu", precision):
        CE()(model(batch)).backward()
        assert model.score(batch).dtype == torch.float32


@BOTH
def test_presets(cls):
    "Both are built, every parameter is trained, and the preset's loss is accepted."
    for name, preset in cls.PRESETS.items():
        model = build(cls, preset=name)
        assert preset["loss"] in cls.losses
        for stage in preset["stages"]: assert set(partition(model, Stage(**stage)).values()) == {0}


# ---- BERT4Rec ----

def slow_bert(model, item):
    "States of one row without pads, (T,) -> (T,D), head by head."
    c = model.config
    D, d = c.d_model, c.d_model // c.n_heads
    x = model.embed_norm(model.items.weight[item] + model.position[-len(item):])
    for block in model.blocks:
        q, k, v = block.attention.qkv(x).split(D, -1)
        heads = [(q[:, s] @ k[:, s].T / d ** .5).softmax(-1) @ v[:, s] for s in (slice(h * d, (h + 1) * d) for h in range(c.n_heads))]
        x = block.norm1(x + block.attention.out(torch.cat(heads, 1)))
        x = block.norm2(x + block.down(F.gelu(block.up(x))))
    return x


@pytest.mark.parametrize("length", [1, 2, 7])
def test_bert_equals_slow_reference(length):
    model, batch = awake(build(BERT4Rec), .1).double(), random_batch(40, B=2, L=length, full=True)
    with torch.no_grad():
        z = model.score(batch)
        for b in range(2):
            h = slow_bert(model, torch.cat([batch.item_seq[b], torch.tensor([41])]))[-1]
            h = model.head_norm(F.gelu(model.head(h)))
            slow = torch.stack([h @ model.items.weight[v] + model.bias[v] for v in range(41)])
            assert float((z[b] - slow)[1:].abs().max()) <= 1e-5        # scores are float32


def test_bert_last_mask_seen():
    "Training meets the situation of use: the last slot is the only hole in at least `last_mask_prob` of the rows, whatever the length."
    torch.manual_seed(0)
    for L, (p, alone) in ((3, (.2, .5)), (20, (.2, .5)), (20, (.4, .2)), (20, (.05, 0.))):
        batch = random_batch(40, B=3000, L=L, full=True)
        hole = holes(batch, L, 41, p, alone)[1] > 0
        only = float((hole[:, -1] & (hole.sum(1) == 1)).float().mean())
        none = (1 - p) ** L
        assert only == pytest.approx(alone + (1 - alone) * none, abs=.03)
        assert float(hole[:, -1].float().mean()) == pytest.approx(alone + (1 - alone) * (p + (1 - p) * none), abs=.03)
        assert float(hole[:, :-1].float().mean()) == pytest.approx((1 - alone) * p, abs=.02) and bool(hole.any(1).all())


def test_bert_holes_tell_nothing():
    "What is hidden cannot be read: other items behind the holes, the same states."
    model = awake(build(BERT4Rec))
    batch = random_batch(40, L=8)
    item, label = holes(batch, 8, 41, .4, .2)
    assert not ((label > 0) & (item != 41)).any() and torch.equal(torch.where(label > 0, label, item)[:, :-1], batch.item_seq)
    torch.manual_seed(3); a = model(batch)
    hidden = a.targets
    torch.manual_seed(3); where = holes(batch, 8, 41, .4, .2)[1] > 0
    item, target = (torch.where(hole, x % 40 + 1, x) for hole, x in ((where[:, :-1], batch.item_seq), (where[:, -1], batch.target)))
    other = replace(batch, item_seq=item, target=target)
    torch.manual_seed(3); b = model(other)
    assert torch.equal(a.states, b.states) and torch.equal(b.targets, hidden % 40 + 1)


def test_bert_hides_event_groups_together():
    "A click and a like of one item at one instant: neither is a lesson beside the other."
    story = [("a", "click", 1), ("a", "like", 1), *[(item, "click", t) for t, item in enumerate("bcde", 2)]]
    frame = pl.DataFrame([(user, *row) for user in "uvw" for row in story], schema=["user", "item", "behavior", "timestamp"], orient="row")
    s = from_events(Events(frame.with_row_index("row"), "s", "made up", {}), name="made", group=("user", "item", "timestamp"))
    batch = collate(s, s.test, [0, 1, 2], 9)
    assert torch.equal(batch.item_seq[:, 0], batch.item_seq[:, 1])
    torch.manual_seed(0)
    found = [holes(batch, 9, 99, .5, .2) for _ in range(100)]
    assert all(torch.equal(item[:, 0] == 99, item[:, 1] == 99) and not (label[:, 1] > 0).any() for item, label in found)
    assert any((label[:, 0] > 0).any() for _, label in found)


def test_bert_wrong_values():
    wrong = [({"mask_prob": 0.}, "above 0"), ({"mask_prob": 1.5}, "mask_prob=1.5"), ({"last_mask_prob": -.1}, "last_mask_prob=-0.1"),
             ({"n_heads": 5}, "not a multiple")]
    for changes, says in wrong:
        with pytest.raises(ValueError, match=says): build(BERT4Rec, **changes)


# ---- GRU4Rec ----

@pytest.mark.parametrize("n_layers", [1, 2])
def test_gru_equals_slow_reference(n_layers):
    "Every state of every row, one event after the other."
    model, batch = awake(build(GRU4Rec, n_layers=n_layers)).double(), random_batch(40, L=8)
    with torch.no_grad():
        h = model.states(batch.item_seq)
        for b in range(len(batch)):
            states = [torch.zeros(128, dtype=torch.float64) for _ in range(n_layers)]
            for t, item in enumerate(batch.item_seq[b][batch.item_seq[b] > 0], 1):
                x = model.items.weight[item]
                for k in range(n_layers):
                    product = lambda w, y, k=k: (getattr(model.gru, f"weight_{w}_l{k}") @ y).chunk(3)
                    (wr, wu, wn), (ur, uu, un) = product("ih", x), product("hh", states[k])
                    u = torch.sigmoid(wu + uu)
                    x = states[k] = (1 - u) * torch.tanh(wn + torch.sigmoid(wr + ur) * un) + u * states[k]
                assert float((h[b, t] - model.out(x)).abs().max()) <= 1e-9


@pytest.mark.parametrize("pads", [1, 3, 20])
def test_gru_does_not_walk_through_pads(pads):
    "Equal to the last bit: scores, lessons and gradients, whatever the pad's vector."
    model, batch = awake(build(GRU4Rec, dropout=0.)), random_batch(40)
    with torch.no_grad():
        z = model.score(batch)
        assert torch.equal(z, model.score(widen(batch, pads)))
        model.items.weight[0] = 7.
        assert torch.equal(z, model.score(widen(batch, pads)))
    grads = []
    for x in (batch, widen(batch, pads)):
        model.zero_grad()
        p = model(x)
        CE()(p).backward()
        grads.append((p.states.detach(), p.targets, *[q.grad.clone() for q in model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_gru_targets_per_epoch():
    "Each event that is read is a target once; with positions='last' one a row."
    model, batch = build(GRU4Rec), random_batch(40, B=20, L=9)
    assert len(model(batch).targets) == int(batch.length.sum())
    assert torch.equal(build(GRU4Rec, positions="last")(batch).targets, batch.target)
    mask = torch.zeros_like(batch.item_seq, dtype=torch.bool); mask[:, -1] = True
    assert torch.equal(model(replace(batch, extra={"label_mask": mask})).targets, batch.target)
