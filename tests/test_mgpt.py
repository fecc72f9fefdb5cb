"""M-GPT against its formulas written with loops, and the mistakes that its public code makes or invites."""

import math
from dataclasses import replace

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from mbnb.checks import awake, build, random_batch, widen
from mbnb.events import ListRows
from mbnb.losses.ce import CE
from mbnb.models.mgpt import MGPT, WindowGates
from mbnb.sequences import from_lists
from mbnb.toyshop import ToyShop, make_shop


def published(seed=0, std=.05, **changes):
    "The published sizes with a small catalogue, all weights awake."
    torch.manual_seed(seed)
    return awake(MGPT(replace(MGPT.Config(60, 4), dropout=0., graph_dropout=0., **changes)), std)


def split_heads(model):
    "The model with the heads of its gates split properly."
    for gate in [g for block in model.blocks for g in block.gates]:
        gate.heads = lambda x, mixed, gate=gate: WindowGates.heads(gate, x, False)
    return model


# ---- the slow version: one row, one level, one slot at a time ----
def slow_row(model, item, behavior):
    "Slots of one row, oldest first, MASK last -> states (levels,T,D) of all T slots, pads behind."
    c = model.config
    T, D, H = c.max_len + 1, c.d_model, c.n_heads
    n = len(item)
    zero = torch.zeros(D, dtype=torch.float64)
    e = torch.stack([model.items.weight[i] for i in item] + [zero] * (T - n))
    b = torch.stack([model.behaviors.weight[k] if k else zero for k in behavior] + [zero] * (T - n))
    A = torch.zeros(T, T, dtype=torch.float64)
    for i in range(n):
        A[i, :n] = torch.sigmoid((e[:n] * b[:n]) @ (e[i] * b[i]))
    A = A + torch.eye(T)
    views, linear = [e + b], model.graph.convolve
    for _ in range(c.item_levels - 1):
        near = lambda t, x: sum(A[t, s] * linear(x[s]) for s in range(T) if A[t, s]) / A[:, t].sum() ** .5
        views.append(torch.stack([F.leaky_relu(near(t, views[-1])) for t in range(T)]))
    place = model.place.flip(0)
    return torch.stack([slow_encoder(model, x, place, n, T, D, H) for x in views])


def slow_encoder(model, x, place, n, T, D, H):
    for block in model.blocks:
        branches = [slow_attention(block.attend, x + place, T, D, H)] + [slow_gates(g, x, n, T, D, H) + place for g in block.gates]
        weights = torch.cat([w.flip(0, 1) for w in block.mix.blocks], 1)
        x = weights @ torch.cat(branches) + block.mix.bias.flip(0)[:, None]
        x = block.norm(x + block.down(F.gelu(block.up(x))))
    return x


def slow_attention(layer, x, T, D, H):
    u, d = layer.norm(x), D // H
    q, k, v = layer.qkv(u).chunk(3, -1)
    heads = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        qh, kh = F.elu(q[:, part]), F.elu(k[:, part])
        qh, kh = qh / qh.norm(dim=1, keepdim=True), kh / kh.norm(dim=1, keepdim=True)
        heads.append((qh @ kh.T) @ v[:, part] / math.sqrt(d))
    return layer.norm(layer.out(torch.cat(heads, 1)) + u)


def slow_gates(layer, x, n, T, D, H):
    w, N, d, out = layer.width, layer.ask.n, D // H, []
    for start in range(0, T, w):
        window, here = x[start:start + w], min(max(n - start, 0), w)
        newest = [window[here - 1 - j] if here - 1 - j >= 0 else window[-1] for j in range(N)]
        questions = []
        for i in range(N):
            weight = torch.cat([layer.ask.by_age[j][(i - j) * D:(i - j + 1) * D] for j in range(i + 1)], 1)
            questions.append(weight @ torch.cat(newest[:i + 1]) + layer.ask.bias[i * D:(i + 1) * D])
        q = torch.stack(questions)
        q = layer.query(q / (q.norm(dim=0) + 1e-12))
        k, v = layer.kv(window).chunk(2, 1)
        rows_q, rows_k, gate = q.reshape(-1, d), k.reshape(-1, d), torch.zeros(w, H, dtype=torch.float64)
        for h in range(H):                                                     # the public reshape: the memory in order, not head by head
            M = torch.sigmoid(rows_q[h * N:(h + 1) * N] @ rows_k[h * w:(h + 1) * w].T)
            g = (torch.softmax(2 * M, 1) ** layer.power).sum(0) ** (1 / layer.power)
            if here: gate[:here, h] = torch.softmax(2 * g[:here], 0)
        scaled = torch.cat([gate[:, h:h + 1] * v[:, h * d:(h + 1) * d] for h in range(H)], 1)
        out.append(layer.norm(layer.out(scaled) + window))
    return torch.cat(out)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 50, 51, 100, 137, 199, 200])
def test_published_equals_slow_reference(length):
    model = published().double()
    batch = random_batch(60, 4, B=1, L=length, full=True, seed=length)
    slots = model.slots(batch, 0.)
    n = int(slots.real.sum())
    with torch.no_grad():
        fast = model.encode(slots, torch.arange(200)[None])[0][:, 0]
        slow = slow_row(model, slots.item[0, :n].tolist(), slots.behavior[0, :n].tolist())
    assert n == min(length, 199) + 1 and float((fast - slow).abs().max()) <= 1e-9


def test_full_rows_agree():
    general = awake(MGPT(replace(MGPT.Config.retail(300, 3), dropout=0., graph_dropout=0.)), .1)
    public = MGPT(replace(general.config, form="published")).eval()
    public.load_state_dict(general.state_dict())
    split_heads(public)
    batch = random_batch(300, B=2, L=199, full=True)
    with torch.no_grad(): assert float((general.score(batch) - public.score(batch))[:, 1:].abs().max()) <= 1e-5


@pytest.mark.parametrize("n", [1, 2, 3, 17, 51, 137])
def test_bucket_invariance(n):
    model = awake(MGPT(MGPT.Config.retail(300, 3)), .1)
    batch = random_batch(300, B=3, L=n, full=n < 3)
    with torch.no_grad(): assert float((model.score(batch) - model.score(widen(batch, 199 - n)))[:, 1:].abs().max()) <= 1e-5


def test_parameter_count():
    assert sum(p.numel() for p in MGPT(MGPT.Config(31239, 4)).parameters()) == 2_958_416


def test_unseen_length():
    "A model with room for 199 events that has only met short rows scores a long one, and events beyond max_len change nothing."
    model = awake(build(MGPT))
    long = random_batch(40, B=2, L=80, full=True)
    with torch.no_grad():
        z = model.score(long)
        cut = replace(long, item_seq=long.item_seq[:, -49:], behavior_seq=long.behavior_seq[:, -49:], time_seq=long.time_seq[:, -49:])
        assert z[:, 1:].isfinite().all() and torch.equal(z, model.score(cut))


def test_prefix_families():
    "Growing prefixes of one list never stand on both sides of the validation split."
    frame = make_shop(ToyShop(n_users=60, n_items=100, seed=3)).events.frame.group_by("user", maintain_order=True).agg("item", "behavior")
    pairs = list(zip(frame["item"].to_list(), frame["behavior"].to_list()))
    row = lambda i, b, k: {"items": i[:k], "behaviors": b[:k], "target": i[k], "target_behavior": b[k]}
    rows = [row(i, b, k) for i, b in pairs for k in (2, 4, 6) if len(i) > k]
    made = lambda part: ListRows(pl.DataFrame([{"row": k, **r} for k, r in enumerate(part)]), "made", {})
    s = from_lists(made(rows), made(rows[:3]), name="made", valid_share=.3)
    lists = lambda cases: {tuple(s.item[a:b]) for a, b in zip(cases.start, cases.stop)}
    prefixes = lambda found: {x[:k] for x in found for k in range(1, len(x) + 1)}
    train, valid = lists(s.train), lists(s.valid)
    assert len(valid) and not prefixes(train) & valid and not prefixes(valid) & train


def test_empty_window_finite():
    "Rows of no event, one event and one window, in both forms: finite scores and gradients."
    for model in (published(), awake(MGPT(MGPT.Config.retail(60, 4)), .05)):
        batch = random_batch(60, 4, B=3, L=60)
        item = batch.item_seq.clone(); item[0] = 0; item[1, :-1] = 0
        batch = replace(batch, item_seq=item, behavior_seq=batch.behavior_seq * (item > 0), time_seq=batch.time_seq * (item > 0))
        assert model.score(batch)[:, 1:].isfinite().all()
        model.train()
        CE()(model(batch)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_gate_reads_its_own_slot():
    "General: the weight at slot t comes from slot t. Published: from slot (h w + t) // H."
    torch.manual_seed(0)
    gates = WindowGates(8, 2, 4, 2, 4, 0.)
    for w in gates.ask.by_age: torch.nn.init.normal_(w)
    q, k = torch.randn(1, 2, 8), torch.randn(1, 4, 8)
    for mixed in (False, True):
        for slot in range(4):
            raw = lambda k, mixed=mixed: (gates.heads(q, mixed) @ gates.heads(k, mixed).transpose(2, 3))[0]            # (H,n,w)
            other = k.clone(); other[0, slot] += 1
            moved = {(h, t) for h in range(2) for t in range(4) if (raw(k) != raw(other))[h, :, t].any()}
            assert moved == {(h, t) for h in range(2) for t in range(4) if ((h * 4 + t) // 2 if mixed else t) == slot}


def test_first_event_can_be_masked():
    "The oldest event is a label as often as the others: no index 0 doubles as padding."
    torch.manual_seed(0)
    for model in (build(MGPT), published()):
        batch, found = random_batch(40, B=32, L=6, full=True), []
        for _ in range(20):
            slots = model.slots(batch, .2)
            found.append((slots.label[:, :6] > 0).float().mean(0))
        share = torch.stack(found).mean(0)
        assert float(share[0]) == pytest.approx(.2, abs=.06) and float(share.std()) < .05


def test_target_is_not_in_the_graph():
    "Another target moves no state, in training as in scoring; the label alone knows it."
    model = awake(build(MGPT)).eval()
    batch = random_batch(40)
    other = replace(batch, target=batch.target % 40 + 1, target_behavior=batch.target_behavior % 3 + 1)
    torch.manual_seed(1); a = model(batch)
    torch.manual_seed(1); b = model(other)
    assert torch.equal(a.states, b.states) and torch.equal(a.aux["edges"], b.aux["edges"]) and not torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("kinds", [1, 2, 9])
def test_two_and_nine_behaviors(kinds):
    "Any number of behaviors, in any order: renumbering them with their vectors changes nothing."
    model = awake(build(MGPT, n_behaviors=kinds))
    batch = random_batch(40, kinds)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(kinds, generator=torch.Generator().manual_seed(2)) + 1])
    with torch.no_grad():
        z = model.score(batch)
        model.behaviors.weight[order] = model.behaviors.weight.clone()
        assert z[:, 1:].isfinite().all() and torch.equal(z, model.score(replace(batch, behavior_seq=order[batch.behavior_seq])))


def test_any_dataset_name():
    "Nothing in the model knows a data set: sizes alone build it."
    assert not {"dataset", "name"} & set(MGPT.Config.__dataclass_fields__)
    assert MGPT(MGPT.Config.small(7, 2)).score(random_batch(7, 2)).shape == (6, 8)


@pytest.mark.parametrize("form", ["general", "published"])
def test_full_ranking_runs(form):
    model = build(MGPT, form=form, max_len=19)
    ids, value = model.recommend(random_batch(40), 10)
    assert ids.shape == (6, 10) and value.isfinite().all() and all(len(set(r)) == 10 for r in ids.tolist())


def test_level_attention_and_wrong_values():
    model = awake(build(MGPT, levels="attention"))
    batch = random_batch(40)
    torch.manual_seed(3); asked = int((model.slots(batch, .2).label > 0).sum())
    torch.manual_seed(3); p = model(batch)
    assert len(p.targets) == asked and model.score(batch)[:, 1:].isfinite().all()          # one row a label, not one a level
    wrong = [({"form": "public"}, "form='public'"), ({"levels": "mean"}, "levels='mean'"),
             ({"n_queries": (1, 2)}, "one number of queries a scale"), ({"form": "published", "max_len": 50}, "divisors")]
    for changes, says in wrong:
        with pytest.raises(ValueError, match=says): build(MGPT, **changes)
