"""The losses that draw negatives, beyond their pages: every loss with every sampler, the known traps, label counts, precision, a model."""
import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mbnb.checks import build, check_loss, init_loss, overfits_one_batch, random_batch
from mbnb.datasets import load
from mbnb.losses.bce import BCE
from mbnb.losses.bpr import BPR
from mbnb.losses.ce import CE
from mbnb.losses.gbce import GBCE, beta, gbce
from mbnb.losses.infonce import InfoNCE
from mbnb.losses.negatives import SAMPLERS, LossError, Negatives, chances, draw, label_counts, learn, scores
from mbnb.losses.sampled_softmax import SampledSoftmax
from mbnb.models.sasrec import SASRec
from mbnb.sequences import Prediction, collate, next_items

LOSSES = (BCE, BPR, GBCE, InfoNCE, SampledSoftmax)
WAYS = list(itertools.product(SAMPLERS, (False, True)))
way = pytest.mark.parametrize("sampler,shared", WAYS, ids=lambda x: {True: "shared", False: "own"}.get(x, x))
every_loss = pytest.mark.parametrize("cls", LOSSES, ids=lambda c: c.__name__)


def rng(seed=0): return torch.Generator().manual_seed(seed)


def case(N=200, V=80, D=6, X=9, seed=0, scale=1.):
    "A Prediction whose rows exclude up to X items, in runs of four rows as of one user, and counts of labels."
    g = rng(seed)
    exclude = torch.randint(0, V, (-(-N // 4), X), generator=g).repeat_interleave(4, 0)[:N]
    p = Prediction((scale * torch.randn(N, D, generator=g)).requires_grad_(), torch.randint(1, V, (N,), generator=g),
                   torch.randn(V, D, generator=g).requires_grad_(), torch.randn(V, generator=g).requires_grad_(), exclude=exclude)
    return p, torch.cat([torch.zeros(1), 900 / torch.arange(1, V)]).long()


def drawn(made, N):
    "-> (row (M,), item (M,)) of all that may count."
    return made.ok.nonzero()[:, 0], made.ids.expand(N, -1)[made.ok]


# ---- the known traps ----

@way
@pytest.mark.parametrize("exclude", (True, False))
def test_negatives_exclude_target(sampler, shared, exclude):
    p, counts = case()
    row, item = drawn(draw(p, rng(), 50, sampler, shared, exclude, counts), 200)
    assert len(row) > 3_000 and (item != p.targets[row]).all()
    p = replace(p, exclude=None)
    row, item = drawn(draw(p, rng(), 50, sampler, shared, exclude, counts), 200)
    assert len(row) > 3_000 and (item != p.targets[row]).all()


@way
def test_negatives_exclude_user_items(sampler, shared):
    p, counts = case()
    row, item = drawn(draw(p, rng(), 50, sampler, shared, True, counts), 200)
    assert not (item[:, None] == p.exclude[row]).any()
    row, item = drawn(draw(p, rng(), 50, sampler, shared, False, counts), 200)
    assert (item[:, None] == p.exclude[row]).any()


@way
@every_loss
def test_pad_never_candidate(cls, sampler, shared):
    p, counts = case()
    loss = learn(cls(n_neg=30, sampler=sampler, shared=shared), counts)
    assert (draw(p, rng(), 30, sampler, shared, True, counts).ids > 0).all()
    table, bias = p.table.detach().clone(), p.bias.detach().clone()
    table[0], bias[0] = torch.nan, torch.nan
    assert loss(p, rng()) == loss(replace(p, table=table, bias=bias), rng())
    loss(p, rng()).backward()
    assert not p.table.grad[0].any() and p.bias.grad[0] == 0 and p.table.grad[1:].any()


def test_gbce_limits():
    p, _ = case()
    for k in (1, 7):
        assert torch.allclose(GBCE(n_neg=k, gbce_t=0.)(p, rng()) * (k + 1), BCE(n_neg=k)(p, rng()))
    for t in (0., .5, 1.):
        assert beta(t, 78, 79) == beta(t, 10_000, 79) == 1
        assert torch.allclose(GBCE(n_neg=78, gbce_t=t)(p, rng()) * 79, BCE(n_neg=78)(p, rng()))
    assert beta(1., 7, 79) == pytest.approx(7 / 78)


def test_gbce_large_logits_finite():
    z = torch.tensor([-1e30, 1e30, -200., 200., 0.], requires_grad=True)
    others = torch.tensor([[1e30, -torch.inf], [-1e30, 5.], [200., 200.], [-200., 0.], [1e-30, 0.]], requires_grad=True)
    value = gbce(z, others, .3)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all() and others.grad.isfinite().all()
    assert z.grad[0] == pytest.approx(-.3 / 15) and others.grad[0, 0] == pytest.approx(1 / 15)


# ---- every loss, every sampler ----

@way
@every_loss
def test_check_loss(cls, sampler, shared): check_loss(learn(cls(n_neg=20, sampler=sampler, shared=shared), torch.full((201,), 1)))


def slow(loss, p, made):
    "The formula, a row and a negative at a time, in double precision."
    z = p.states.double() @ p.table.double().T + p.bias.double()
    q, q_others = chances(loss, p, made)
    q = torch.zeros(len(z)) if isinstance(q, float) else q
    q_others = (torch.zeros(made.ids.shape) if isinstance(q_others, float) else q_others).expand(len(z), -1)
    ids, total = made.ids.expand(len(z), -1), 0.
    sp = lambda x: torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    tau = getattr(loss, "tau", 1.)
    for n, y in enumerate(p.targets.tolist()):
        right, rest = z[n, y], [z[n, ids[n, j]] for j in range(loss.n_neg) if made.ok[n, j]]
        if isinstance(loss, BPR): total += sum(sp(x - right) for x in rest) / loss.n_neg
        elif isinstance(loss, GBCE):
            alpha = loss.n_neg / (len(p.table) - 2)
            total += ((1 - loss.gbce_t * (1 - alpha)) * sp(-right) + sum(map(sp, rest))) / (loss.n_neg + 1)
        elif isinstance(loss, BCE): total += sp(-right) + sum(map(sp, rest))
        else:
            rest = [x / tau - q_others[n, j] for x, j in zip(rest, made.ok[n].nonzero()[:, 0])]
            every = torch.stack([right / tau - q[n], *rest])
            total += every.logsumexp(0) - every[0]
    return total / len(z)


@way
@every_loss
def test_equals_the_formula_with_gradients(cls, sampler, shared):
    p, counts = case(N=20)
    loss = learn(cls(n_neg=6, sampler=sampler, shared=shared, **({"tau": .5} if cls is InfoNCE else {})), counts)
    ours = torch.autograd.grad(loss(p, rng(3)), [p.states, p.table, p.bias])
    made = draw(p, rng(3), 6, sampler, shared, True, counts)
    theirs = slow(loss, p, made)
    assert loss(p, rng(3)).item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(ours, torch.autograd.grad(theirs, [p.states, p.table, p.bias])): assert torch.allclose(a, b, atol=1e-6)


@way
@every_loss
def test_user_items_have_no_influence(cls, sampler, shared):
    p, counts = case(N=1)
    loss = learn(cls(n_neg=200, sampler=sampler, shared=shared), counts)
    mine = p.exclude[0][(p.exclude[0] != 0) & (p.exclude[0] != p.targets[0])]
    table = p.table.detach().clone()
    table[mine] += 5
    assert loss(p, rng()) == loss(replace(p, table=table), rng())
    free = replace(loss, exclude=False)
    learn(free, counts)
    if sampler != "in_batch": assert free(p, rng()) != free(replace(p, table=table), rng())


@way
@every_loss
def test_same_state_same_value(cls, sampler, shared):
    p, counts = case()
    loss = learn(cls(n_neg=5, sampler=sampler, shared=shared), counts)
    assert loss(p, rng(1)) == loss(p, rng(1)) != loss(p, rng(2))
    g = rng(1)
    assert loss(p, g) != loss(p, g)


@way
@every_loss
def test_nothing_left_to_draw(cls, sampler, shared):
    "A user who took everything, alone in a batch, and no rows at all: finite, and no gradient but of the target's own term."
    p, counts = case(N=3, V=6)
    p = replace(p, exclude=torch.arange(6).expand(3, -1))
    loss = learn(cls(n_neg=4, sampler=sampler, shared=shared), counts)
    value = loss(p, rng())
    grads = torch.autograd.grad(value, [p.states, p.table])
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    if cls in (BPR, InfoNCE, SampledSoftmax): assert value == 0 and not any(g.any() for g in grads)
    none = Prediction(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64), torch.zeros(6, 4, requires_grad=True))
    value = loss(none, rng())
    value.backward()
    assert value == 0 and value.requires_grad


@pytest.mark.parametrize("scale", (1e2, 1e6, 1e12))
@every_loss
def test_large_logits(cls, scale):
    p, _ = case(scale=scale)
    value = cls(n_neg=20)(p, rng())
    value.backward()
    assert value.isfinite() and all(x.grad.isfinite().all() for x in (p.states, p.table, p.bias))


@every_loss
def test_bfloat16(cls):
    p, _ = case()
    exact = cls(n_neg=20)(p, rng())
    with torch.autocast("cpu", torch.bfloat16):
        low = cls(n_neg=20)(replace(p, states=p.states.bfloat16()), rng())
        assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=.01)
    low.backward()
    assert p.states.grad.isfinite().all() and p.table.grad.dtype == torch.float32


@every_loss
def test_refusals(cls):
    p, counts = case()
    for wrong, message in ((dict(n_neg=0), "at least one"), (dict(sampler="hard"), "expected one of uniform, popularity, in_batch")):
        with pytest.raises(LossError, match=message): cls(**wrong)
    with pytest.raises(LossError, match="repeat head"): cls()(replace(p, copy=torch.zeros(200, 2)), rng())
    with pytest.raises(LossError, match=r"loss.prepare\(sequences\)"): cls(sampler="popularity")(p, rng())
    with pytest.raises(LossError, match="built for"): learn(cls(sampler="popularity"), counts[:-1])(p, rng())


def test_settings_are_plain():
    "What a run stores of a loss are its settings; what `prepare` told it goes along in a copy but is none of them."
    s = load("toyshop-tiny")
    loss = GBCE(n_neg=3, sampler="popularity").prepare(s)
    assert loss == GBCE(n_neg=3, sampler="popularity") and "counts" not in repr(loss)
    assert torch.equal(copy.deepcopy(loss).counts, label_counts(s)) and GBCE.counts is None


# ---- the draw ----

@way
def test_draws_follow_the_tickets(sampler, shared):
    "Chi square of what each open item got, over rows that close different items."
    p, counts = case(N=40, V=30)
    got = np.zeros((40, 30))
    batch = torch.bincount(p.targets, minlength=30)
    w = {"uniform": torch.ones(30), "popularity": counts.clamp(min=1), "in_batch": batch}[sampler].double()
    open_ = torch.ones(40, 30).scatter_(1, torch.cat([p.exclude, p.targets[:, None]], 1), 0.)
    open_[:, 0] = 0
    made = draw(p, rng(), 20_000, sampler, shared, True, counts)
    row, item = drawn(made, 40)
    np.add.at(got, (row.numpy(), item.numpy()), 1)
    want = (open_ * w).numpy() if not shared else (open_ * w / w[1:].sum()).numpy() * 20_000
    want = want if shared else want / want.sum(1, keepdims=True) * 20_000
    assert (got[want == 0] == 0).all()
    z = ((got - want) / np.sqrt(want + 1e-9))[want > 0]
    assert (np.abs(z) < 5.5).all() and (shared or z.std() < 1.1)


def test_the_last_ticket_is_open():
    "Closed items at both ends and in a row, each open item alone."
    table = torch.zeros(7, 1)
    for left in range(1, 7):
        closed = torch.tensor([[v for v in range(6, -1, -1) if v != left]])
        p = Prediction(torch.zeros(1, 1), closed[0, :1], table, exclude=closed)
        assert (draw(p, rng(left), 50).ids == left).all()


def test_rows_of_one_user_need_not_be_successive():
    p, _ = case(N=60)
    order = torch.randperm(60, generator=rng(5))
    q = replace(p, targets=p.targets[order], exclude=p.exclude[order])
    row, item = drawn(draw(q, rng(), 300), 60)
    assert not (item[:, None] == q.exclude[row]).any() and (item != q.targets[row]).all()
    assert len(set(zip(row.tolist(), item.tolist()))) > 60 * 60


def test_large_catalogue():
    "100,000 items and two billion labels: whole numbers stay exact."
    V = 100_001
    counts = torch.full((V,), 20_000)
    y, exclude = torch.randint(1, V, (64,), generator=rng()), torch.randint(1, V, (64, 50), generator=rng(1))
    p = Prediction(torch.zeros(64, 2), y, torch.zeros(V, 2), exclude=exclude)
    ids = draw(p, rng(), 500, "popularity", counts=counts).ids
    assert 1 <= ids.min() < 100 and V - 100 < ids.max() < V
    assert not (ids[:, :, None] == p.exclude[:, None]).any()


@pytest.mark.parametrize("labels", ("all", "last", "groups"))
def test_label_counts_are_those_of_the_batches(labels):
    s = load("toyshop-tiny")
    if labels == "last": s = replace(s, labels="last")
    if labels == "groups": s = replace(s, first=np.random.default_rng(0).random(len(s.first)) < .7)
    y = next_items(collate(s, s.train, np.arange(len(s.train)), 10_000))
    assert torch.equal(label_counts(s), torch.bincount(y[y > 0], minlength=s.n_items + 1))


# ---- relations and models ----

def test_all_items_once_is_cross_entropy():
    p, _ = case(N=30, V=12)
    rest = torch.stack([torch.tensor([v for v in range(1, 12) if v != y]) for y in p.targets.tolist()])
    z, others = scores(p, Negatives(rest, rest > 0))
    assert torch.allclose(F.pad(others - z[:, None], (1, 0)).logsumexp(1).mean(), CE()(p), atol=1e-5)


def test_popular_negatives_have_a_known_start():
    p, counts = case(N=2000, V=300, scale=.003, seed=1)
    p = replace(p, targets=torch.multinomial(counts.double(), 2000, replacement=True, generator=rng(2)), bias=None, exclude=None)
    for cls, sampler in itertools.product((InfoNCE, SampledSoftmax), ("popularity", "in_batch")):
        loss = learn(cls(n_neg=100, sampler=sampler, shared=False), counts)
        assert loss(p, rng()).item() == pytest.approx(loss.at_init(299), rel=.05)


@every_loss
def test_trains_a_model(cls):
    "C09 and C11 on SASRec."
    loss, batch = cls(n_neg=10), random_batch(40)
    model = build(SASRec, dropout=0.).eval()
    init_loss(model, batch, loss)
    overfits_one_batch(model, batch, loss)
