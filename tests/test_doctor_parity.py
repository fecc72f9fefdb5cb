"""Gradients of two real processes against one big batch: the five steps that runners take, and some that users write."""
from functools import partial

import pytest
import torch
from torch.distributed import all_reduce
from torch.nn.parallel import DistributedDataParallel

from mbnb.doctor import DoctorError
from mbnb.doctor import parity as P


def mean_by_name(model, micro_batches, world, rank):
    "Right without a wrapper: the mean of the gradients, reduced by a name that this module imported; a counter is reduced as well."
    for batch in micro_batches: (P.toy_loss(model, batch) / len(micro_batches)).backward()
    all_reduce(torch.ones(2, dtype=torch.int64))
    for p in model.parameters():
        all_reduce(p.grad)
        p.grad /= world


def summed(model, micro_batches, world, rank):
    "The division is missing."
    mean_by_name(model, micro_batches, world, rank)
    for p in model.parameters(): p.grad *= world


def uneven(rank, accumulate):
    "Micro-batches of 2 and of 14 rows: a mean of their means is no mean over rows."
    return [(x[:n], y[:n]) for (x, y), n in zip(P.toy_batches(rank, accumulate, rows=14), (2, 14), strict=True)]


def fails(model, micro_batches, world, rank): raise RuntimeError(f"rank {rank} of {world} has no rows")


def frozen():
    model = P.toy_model()
    model[0].requires_grad_(False)
    return model


def frozen_step(model, micro_batches, world, rank):
    ddp = DistributedDataParallel(model)
    for batch in micro_batches: P.toy_loss(ddp, batch).backward()


TOY = dict(make_model=P.toy_model, make_batches=P.toy_batches, loss=P.toy_loss)
OWN = {
    "by name": TOY | dict(step=mean_by_name, accumulate=2),
    "summed": TOY | dict(step=summed),
    "uneven": TOY | dict(make_batches=uneven, step=partial(P.toy_step, divide=False, reduce="never"), accumulate=2),
    "frozen": TOY | dict(make_model=frozen, step=frozen_step),
}


@pytest.fixture(scope="module")
def found():
    toys = {row: TOY | dict(step=partial(P.toy_step, **how), accumulate=n) for row, (n, how) in P.TOY_STEPS.items()}
    return P.gradient_parities(toys | OWN)


@pytest.mark.parametrize("row,ratio,cards", [
    ("DDP, sum once, A=1", 1., ("ok", "W")), ("DDP, sum once, A=4", 1., ("ok", "W")), ("DDP, no sum", .5, ("E", "ok")),
    ("DDP, sum at every micro-batch, A=4", None, ("E", "W")), (".module, sum once, A=4", 1., ("ok", "ok")),
    (".module, no sum", None, ("E", "ok")),
    ("DDP alone, loss not divided", 1., ("ok", "ok")), ("by name", 1., ("ok", "ok")), ("summed", 2., ("E", "ok")),
    ("uneven", None, ("E", "ok")), ("frozen", 1., ("ok", "ok"))])
def test_row(found, row, ratio, cards):
    p = found[row]
    if ratio is not None: assert abs(p.ratio - ratio) < 1e-3 and abs(p.off - abs(ratio - 1)) < 1e-3
    assert tuple(c.severity for c in P.parity_cards(p)) == cards


def test_words(found):
    fix = {row: P.parity(p).fix for row, p in found.items()}
    assert "divide the loss, or the summed gradients" in fix["summed"] and "averages already" in fix["DDP, no sum"]
    assert "weigh micro-batches by their rows" in fix["uneven"] and "replicas" in fix[".module, no sum"]
    assert "replicas differ" in P.parity(found[".module, no sum"]).message and found[".module, no sum"].spread > .1
    assert found["by name"].reduced == 4 and found["by name"].equal == 0          # the counter is no gradient
    card = P.double_sync(found["DDP, sum at every micro-batch, A=4"])
    assert card.value == 16 and "16 of 16" in card.message


def test_limit_is_a_limit(found):
    from mbnb.doctor import limits
    assert P.parity(found["DDP, no sum"], limits(**{"C15.relative": .6})).severity == "ok"


def test_a_failing_step_is_told():
    with pytest.raises(DoctorError, match="has no rows"): P.gradient_parity(**TOY | dict(step=fails))


def test_what_cannot_be_imported_is_refused_at_once():
    def local(model, micro_batches, world, rank): pass
    with pytest.raises(DoctorError, match="cannot be imported"): P.gradient_parity(**TOY | dict(step=local))
