"""The repeat head beyond its page: blocks, precision, cloze queries, the models and the loss around it."""
from dataclasses import replace

import pytest
import torch

from mbnb.checks import awake, build, check_floors, random_batch
from mbnb.losses.ce import CE, cross_entropy
from mbnb.models.sasrec import SASRec
from mbnb.repeat import NEVER, History, RepeatHead, candidates, record

T, B, C, D = 12, 9, 3, 8


def case(seed=0, items=6):
    "A head with noise on its weights, its memory of random histories, states and plain logits."
    torch.manual_seed(seed)
    batch = random_batch(items, C, B=B, L=T, seed=seed)
    head = awake(RepeatHead(D, C), std=.4, seed=seed)
    e = torch.randn(B, T, D)
    return head, History.of(batch, T), e, torch.randn(B, D), torch.randn(B, items + 1)


def every_query(history):
    "Each column after an event: (row, column)."
    row, column = history.known.nonzero(as_tuple=True)
    return row, column + 1


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_change_nothing(block):
    _, h, *_ = case()
    row, column = every_query(h)
    following = record(h, C).next
    whole = candidates(h.known, following, row, column)
    for a, b in zip(whole, candidates(h.known, following, row, column, block=block)): assert torch.equal(a, b)


def test_alpha_sums_to_one_at_every_column():
    head, h, e, *_ = case()
    row, column = every_query(h)
    p = head.pointers(torch.randn(len(row), D), row, column, head.prepare(h, e), torch.randint(0, C + 1, (len(row),)))
    total = torch.zeros(len(row)).index_add(0, p.query, p.weight.exp())
    assert torch.allclose(total, torch.ones(len(row)), atol=1e-5)
    assert torch.allclose(p.repeat.exp() + p.explore.exp(), torch.ones(len(row)), atol=1e-5)
    keys = p.query * 1000 + p.item
    assert len(keys.unique()) == len(keys)                       # an item at most once a query
    assert (p.slot < column[p.query]).all()


def test_forward_says_what_score_says():
    head, h, e, states, z = case()
    m, column = head.prepare(h, e), torch.full((B,), T)
    target = torch.randint(1, 7, (B,))
    copy = head(states, torch.arange(B), column, m, targets=target)
    mixed = torch.logaddexp(copy[:, 0], copy[:, 1] + z[:, 1:].log_softmax(1).gather(1, target[:, None] - 1)[:, 0])
    assert torch.allclose(mixed, head.score(states, z, m).gather(1, target[:, None])[:, 0], atol=1e-5)


def test_masked_slots_are_no_candidates():
    "A cloze model asks at a masked slot: neither it nor another masked slot is pointed at, and what stands there does not matter."
    head, h, e, states, z = case()
    masked = torch.rand(B, T) < .3
    masked[:, -1] = True
    known, column = h.known & ~masked, torch.full((B,), T - 1)
    given = replace(h, known=known)
    blank = lambda x, value: torch.where(masked, value, x)
    hidden = replace(h, item=blank(h.item, 99), behavior=blank(h.behavior, 0), time=blank(h.time, 0), known=known)
    p = head.pointers(states, torch.arange(B), column, head.prepare(given, e))
    assert not masked[p.query, p.slot].any()
    a, b = (head.score(states, z, head.prepare(x, e), column) for x in (given, hidden))
    assert torch.allclose(a[:, 1:], b[:, 1:], atol=1e-5)


def test_gradients():
    "Along a random direction the slope is the gradient's, for every weight of the head."
    head, h, e, states, _ = case()
    target = h.item[:, -1].clamp(min=1)
    target[:3] = 6
    def value():
        copy = head(states, torch.arange(B), torch.full((B,), T), head.prepare(h, e), targets=target)
        return torch.logaddexp(*copy.unbind(1)).clamp(min=-50).mean()
    value().backward()
    for name, p in head.named_parameters():
        step, slopes = torch.randn_like(p), []
        with torch.no_grad():
            for size in (.01, -.02): p += size * step; slopes.append(value())
            p += .01 * step
        assert abs((slopes[0] - slopes[1]) / .02 - (p.grad * step).sum()) < 2e-2 * max(1, (p.grad * step).sum().abs()), name


def test_the_pointer_reads_vectors_but_does_not_train_them():
    head, h, e, states, _ = case()
    e, states = e.requires_grad_(), states.requires_grad_()
    p = head.pointers(states, torch.arange(B), torch.full((B,), T), head.prepare(h, e))
    assert torch.autograd.grad(p.weight.square().sum(), (e, states), retain_graph=True, allow_unused=True) == (None, None)
    gate = torch.autograd.grad(p.repeat.sum(), (e, states), allow_unused=True)
    assert gate[0] is None and gate[1].abs().sum() > 0


def test_bfloat16_and_empty_batches():
    head, h, e, states, z = case()
    exact = head.score(states, z, head.prepare(h, e))
    with torch.autocast("cpu", torch.bfloat16): rough = head.score(states, z, head.prepare(h, e))
    assert rough.dtype == torch.float32 and (exact[:, 1:] - rough[:, 1:]).abs().max() < .5
    none = torch.zeros(0, dtype=torch.int64)
    assert head(states[:0], none, none, head.prepare(h, e), targets=none).shape == (0, 2)


def test_far_and_long():
    "Two hundred events of one item, and of two hundred items, with time stamps in milliseconds."
    head = RepeatHead(D, C)
    for item in (torch.ones(1, 200, dtype=torch.int64), torch.arange(1, 201)[None]):
        h = History(item, torch.ones_like(item), torch.arange(200)[None] * 86_400_000 + 1_500_000_000_000, item > 0)
        s = head.score(torch.zeros(1, D), torch.zeros(1, 301), head.prepare(h, torch.zeros(1, 200, D)))
        assert s[:, 1:].isfinite().all() and abs(s.exp().sum().item() - 1) < 1e-4


@pytest.mark.parametrize("positions", ["all", "last"])
def test_sasrec_copies_from_the_past_only(positions):
    "What a later event is moves no earlier row of `copy`; the last column says what `score` says."
    model, batch = awake(build(SASRec, head="repeat", positions=positions, dropout=0.)), random_batch(40, full=True)
    a = model(batch)
    log_p = torch.logaddexp(a.copy[:, 0], a.copy[:, 1] + (a.states @ a.table[1:].T).log_softmax(1).gather(1, a.targets[:, None] - 1)[:, 0])
    last = log_p.view(len(batch), -1)[:, -1]
    assert torch.allclose(last, model.score(batch).gather(1, batch.target[:, None])[:, 0], atol=1e-4)
    assert abs(-log_p.mean().item() - CE()(a).item()) < 1e-4
    if positions == "last": return
    for field, value in (("item_seq", 7), ("behavior_seq", 3), ("time_seq", 10**9)):
        x = getattr(batch, field).clone(); x[:, -1] = value
        b = model(replace(batch, **{field: x}))
        rows = torch.arange(len(a.copy)).view(len(batch), -1)[:, :-2].ravel()      # the last item is the target of the last but one
        assert torch.allclose(a.copy[rows], b.copy[rows], atol=1e-5), field


def test_the_plain_head_has_no_part_of_it():
    model = build(SASRec)
    assert not any(name.startswith("repeat") for name, _ in model.named_parameters())
    assert model(random_batch(40)).copy is None
    with pytest.raises(ValueError, match="softmax, repeat"): build(SASRec, head="pointer")


def test_rows_that_cannot_repeat_train_the_softmax_alone():
    g = torch.Generator().manual_seed(0)
    states, table, targets = torch.randn(30, D, generator=g), torch.randn(20, D, generator=g), torch.randint(0, 20, (30,), generator=g)
    copy = torch.stack([torch.full((30,), NEVER), torch.zeros(30)], 1)
    plain, mixed = ([x.requires_grad_() for x in (states.clone(), table.clone())] for _ in range(2))
    a, b = cross_entropy(*plain, targets), cross_entropy(*mixed, targets, copy=copy)
    a.backward(); b.backward()
    assert torch.allclose(a, b, atol=1e-6)
    for x, y in zip(plain, mixed): assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_the_head_stands_on_the_ground_floor():
    import mbnb
    assert check_floors(mbnb.__path__[0])
