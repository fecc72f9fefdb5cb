"""The selective scan and the models built on it (Mamba4Rec, SIGMA, MBR-Mamba) against slow versions, and the mistakes that they invite."""
import sys
import types
import warnings
from dataclasses import replace

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from mbnb import datasets, layers
from mbnb.checks import awake, build, check_model, random_batch, widen
from mbnb.doctor import config as of_config
from mbnb.events import Events
from mbnb.experiment import configure, run_experiment
from mbnb.layers import LOG2_E, Mamba, SigmaBlock, cloze, flip_old, scan_blocks, scan_doubling, scan_kernel, scan_loop, selective_scan
from mbnb.losses.ce import CE
from mbnb.models.gear import GEAR, as_steps
from mbnb.models.mamba4rec import Mamba4Rec
from mbnb.models.mbr_mamba import MBRMamba
from mbnb.models.mgpt import MGPT
from mbnb.models.pbat import PBAT
from mbnb.models.sigma import SIGMA
from mbnb.models.sigma_mule import SigmaMuLe
from mbnb.sequences import asked_behaviors, batches, from_events, next_items

FORMS = {"loop": scan_loop, "blocks": scan_blocks, "doubling": scan_doubling}
ALL = pytest.mark.parametrize("cls", [Mamba4Rec, SIGMA, MBRMamba])


# ---- the scan ----
def slow_scan(delta, A, u, B, C):
    "The recurrence as it is written, one step and one row after the other."
    rows = []
    for b in range(len(delta)):
        h, y = torch.zeros_like(A), []
        for t in range(delta.shape[1]):
            h = torch.exp(delta[b, t, :, None] * A) * h + torch.outer(delta[b, t] * u[b, t], B[b, t])
            y.append(h @ C[b, t])
        rows.append(torch.stack(y))
    return torch.stack(rows)


def drawn(B, L, E, S, dtype=torch.float64, scale=1.):
    g = torch.Generator().manual_seed(L)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    parts = F.softplus(draw(B, L, E)) * scale, -torch.rand(E, S, generator=g, dtype=dtype) * S, draw(B, L, E), draw(B, L, S), draw(B, L, S)
    return [x.requires_grad_() for x in parts]


def with_gradients(form, parts):
    y = form(*parts)
    weight = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
    return [y, *torch.autograd.grad((y * weight).sum(), parts, materialize_grads=True)]


def apart(form, parts):
    return max(float((a - b).detach().abs().max()) for a, b in zip(with_gradients(form, parts), with_gradients(slow_scan, parts)))


def share_apart(form, parts):
    "In float32, against the slow scan in float64: the largest difference of values and of each gradient, as a share of its largest entry."
    single = [x.detach().float().requires_grad_() for x in parts]
    pairs = zip(with_gradients(form, single), with_gradients(slow_scan, parts))
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 7, 50, 199])
def test_scan_equals_loop(form, L):
    "Values and all five gradients."
    assert apart(FORMS[form], drawn(2, L, 3, 4)) <= 1e-10
    assert apart(FORMS[form], drawn(2, L, 3, 4, torch.float32)) <= 1e-4 * L ** .5
    assert share_apart(FORMS[form], drawn(2, L, 3, 4)) <= 1e-5


@pytest.mark.parametrize("block", [1, 3, 6, 50, 80])
def test_scan_blocks_of_any_size(block):
    assert apart(lambda *a: scan_blocks(*a, block=block), drawn(3, 50, 3, 4)) <= 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_scan_large_delta_finite(form):
    "Decays underflow to 0 and nothing is divided by them: values and gradients stay right, where a quotient of cumulative products is NaN."
    parts = drawn(2, 60, 3, 32, torch.float32, scale=40.)
    found, slow = with_gradients(FORMS[form], parts), with_gradients(slow_scan, parts)
    assert all(x.isfinite().all() for x in found)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max())) for a, b in zip(found, slow))
    delta, A, u, B, _ = parts
    total = (delta.cumsum(1).unsqueeze(3) * A).exp()
    divided = total * ((delta * u).unsqueeze(3) * B.unsqueeze(2) / total).cumsum(1)
    assert not divided.isfinite().all()


def test_scan_gradcheck():
    assert torch.autograd.gradcheck(scan_loop, drawn(2, 5, 3, 2))
    assert torch.autograd.gradcheck(lambda *a: scan_blocks(*a, block=2), drawn(2, 5, 3, 2))


def test_scan_without_some_gradients():
    "What needs no gradient may be a constant, and a scan without gradients keeps nothing."
    delta, A, u, B, C = drawn(2, 9, 3, 4)
    y = scan_loop(delta.detach(), A, u.detach(), B.detach(), C.detach())
    g, = torch.autograd.grad(y.sum(), A)
    assert torch.allclose(g, torch.autograd.grad(slow_scan(delta, A, u, B, C).sum(), A)[0])
    with torch.no_grad(): assert not scan_loop(delta, A, u, B, C).requires_grad


def test_scan_memory_grows_with_the_root():
    "What the forward pass keeps of the states is one in sqrt(L)."
    kept = []
    for L in (100, 400):
        y = scan_loop(*drawn(2, L, 3, 4))
        kept.append(y.grad_fn.next_functions[0][0].saved_tensors[-1].shape[0])
    assert kept == [10, 20]


def test_scan_of_half_precision():
    "Computed in float32, also under autocast."
    parts = [x.detach() for x in drawn(2, 20, 4, 4, torch.float32)]
    half = [x.bfloat16() for x in parts]
    for form in FORMS:
        assert selective_scan(*half, form).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16): found = selective_scan(*parts, form), selective_scan(*half, form)
        assert torch.allclose(found[0], slow_scan(*parts), atol=1e-4)
        assert torch.allclose(found[1], slow_scan(*[x.float() for x in half]), atol=1e-4)


def test_scan_names():
    parts = drawn(1, 3, 2, 2)
    with pytest.raises(ValueError, match="scan='lopp': expected one of 'auto', 'loop', 'blocks', 'doubling', 'mamba_ssm'"):
        selective_scan(*parts, "lopp")
    for cls in (Mamba4Rec, SIGMA, MBRMamba):
        with pytest.raises(ValueError, match="scan='lopp'"): build(cls, scan="lopp")


def kernel_package(monkeypatch, seen):
    "A stand-in for mamba-ssm with the layout that its reference function documents: u, delta (B,E,L), A (E,S), B, C (B,S,L)."
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert D is None and z is None and delta_bias is None and not delta_softplus
        seen.append((u.shape, B.shape))
        return slow_scan(delta.transpose(1, 2), A, u.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)).transpose(1, 2)
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    made = {name: types.ModuleType(name) for name in names}
    made[names[-1]].selective_scan_fn = selective_scan_fn
    for name, module in made.items(): monkeypatch.setitem(sys.modules, name, module)


class OnCuda(torch.Tensor):
    "A tensor that says it lies on a GPU."
    is_cuda = True


def test_kernel_gets_our_layout(monkeypatch):
    seen = []
    kernel_package(monkeypatch, seen)
    parts = [x.detach() for x in drawn(2, 9, 3, 4)]
    y = scan_kernel(parts[0].as_subclass(OnCuda), *parts[1:])
    assert torch.allclose(torch.Tensor(y.as_subclass(torch.Tensor)), slow_scan(*parts)) and seen == [((2, 3, 9), (2, 4, 9))]
    with pytest.raises(ValueError, match="the tensors lie on 'cpu', expected 'cuda'"): scan_kernel(*parts)


@pytest.mark.parametrize("factor", [1., 1.01])
def test_a_kernel_that_differs_is_not_taken(monkeypatch, factor):
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(layers, "scan_kernel", lambda *parts: factor * slow_scan(*parts))
    agrees = layers.agrees
    monkeypatch.setattr(layers, "agrees", lambda scan, device: agrees(scan))
    layers.kernel_agrees.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert layers.auto_scan(cuda=True) == ("mamba_ssm" if factor == 1 else "blocks")
    assert [("differs from the loop" in str(w.message)) for w in said] == [True] * (factor != 1)
    layers.kernel_agrees.cache_clear()


def test_kernel_missing_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ImportError, match="scan='mamba_ssm': the package mamba-ssm cannot be imported"):
        selective_scan(*drawn(1, 3, 2, 2), "mamba_ssm")
    assert torch.equal(selective_scan(*drawn(1, 3, 2, 2)), scan_loop(*drawn(1, 3, 2, 2)))           # auto does not need it


def test_decay_base():
    x = -torch.rand(1000, dtype=torch.float64) * 50
    assert torch.allclose((x * LOG2_E).exp2(), x.exp(), rtol=1e-12)


# ---- the layer ----
def slow_mamba(m, x, bias=None):
    "One row (L,D) without pads -> (L,D): the layer of the paper, event by event."
    E, S, k = m.skip.shape[0], m.A_log.shape[1], m.conv.kernel_size[0]
    ug = x @ m.enter.weight.T
    u, gate = ug[:, :E], ug[:, E:]
    h, out = torch.zeros(E, S, dtype=x.dtype), []
    for t in range(len(x)):
        c = m.conv.bias.clone()
        for j in range(k):
            if t - j >= 0: c = c + m.conv.weight[:, 0, k - 1 - j] * u[t - j]
        c = c * torch.sigmoid(c)
        chosen = m.choose.weight @ c
        R = len(chosen) - 2 * S
        step = m.step.weight @ chosen[:R] + m.step.bias + (bias[t] if bias is not None else 0)
        delta = torch.log1p(torch.exp(step))
        h = torch.exp(-delta[:, None] * torch.exp(m.A_log)) * h + torch.outer(delta * c, chosen[R:R + S])
        y = h @ chosen[R + S:] + m.skip * c
        out.append(m.out.weight @ (y * gate[t] * torch.sigmoid(gate[t])))
    return torch.stack(out)


@pytest.mark.parametrize("sizes", [{"d_state": 4}, {"d_state": 3, "d_conv": 2, "expand": 1}])
def test_mamba_equals_slow_reference(sizes):
    torch.manual_seed(0)
    m = awake(Mamba(20, **sizes).double(), .3)
    x, real = torch.randn(2, 11, 20, dtype=torch.float64), torch.ones(2, 11, dtype=torch.bool)
    bias = torch.randn(2, 11, m.skip.shape[0], dtype=torch.float64)
    for b in (None, bias, bias[:, :, :1]):
        y = m(x, real, b)
        for r in range(2): assert torch.allclose(y[r], slow_mamba(m, x[r], None if b is None else b[r]), atol=1e-10)


@pytest.mark.parametrize("broken", ["before", "behind"])
def test_padding_invariance_of_the_layer(broken):
    "Fails without either of the two masks."
    class Unmasked(Mamba):
        "The layer with one mask only."
        def chosen(self, x, real, delta_bias=None):
            m, every = real.unsqueeze(2).to(x.dtype), torch.ones_like(real)
            if broken == "behind": return super().chosen(x * m, every, delta_bias)
            delta, u, B, C, gate = super().chosen(x, every, delta_bias)
            u = self.enter(x).chunk(2, 2)[0]
            u = F.silu(self.conv(F.pad(u.transpose(1, 2), (3, 0))).transpose(1, 2)) * m
            r, B, C = self.choose(u).split(self.sizes, 2)
            return F.softplus(self.step(r)), u, B, C, gate
    torch.manual_seed(0)
    sound, wrong = awake(Mamba(16, 4)), awake(Unmasked(16, 4))
    wrong.load_state_dict(sound.state_dict())
    x = torch.randn(2, 6, 16)
    front = lambda layer: layer(torch.cat([torch.full((2, 5, 16), 3.), x], 1), torch.arange(11).ge(5).expand(2, 11))[:, 5:]
    alone = sound(x, torch.ones(2, 6, dtype=torch.bool))
    assert torch.allclose(front(sound), alone, atol=1e-5)
    assert float((front(wrong) - alone).detach().abs().max()) > 1e-3


def test_starts_of_delta():
    "Memories of ten to a thousand events, or of a few."
    delta = {kind: F.softplus(Mamba(64, 8, dt_init=kind).step.bias.detach()) for kind in ("log_uniform", "zero_bias")}
    assert .001 <= delta["log_uniform"].min() and delta["log_uniform"].max() <= .1001 and delta["log_uniform"].log().std() > 1
    assert torch.allclose(delta["zero_bias"], torch.tensor(2.).log())


# ---- all three models ----
@ALL
def test_padding_invariance(cls):
    "Each row scores alone as it does beside longer ones, with any number of pads in front."
    model, batch = awake(build(cls)), random_batch(40, B=5, L=9)
    with torch.no_grad():
        z = model.score(batch)
        for b in range(5):
            n = int(batch.length[b])
            one = replace(batch, **{k: getattr(batch, k)[b:b + 1, -n:] for k in ("item_seq", "behavior_seq", "time_seq")},
                          **{k: getattr(batch, k)[b:b + 1] for k in ("length", "user", "target", "target_behavior", "target_time", "case")})
            assert float((model.score(widen(one, b)) - z[b])[:, 1:].abs().max()) <= 1e-4


@ALL
def test_events_beyond_max_len_are_not_read(cls):
    model, batch = awake(build(cls, max_len=6)), random_batch(40, L=6, full=True)
    front = torch.randint(1, 41, (len(batch), 4))
    longer = replace(batch, item_seq=torch.cat([front, batch.item_seq], 1), behavior_seq=torch.cat([front * 0 + 1, batch.behavior_seq], 1),
                     time_seq=torch.cat([front * 0, batch.time_seq], 1))
    with torch.no_grad(): assert torch.equal(model.score(batch), model.score(longer))


@ALL
def test_all_pad_row_is_finite_and_trains(cls):
    model, batch = build(cls), random_batch(40)
    item = batch.item_seq.clone(); item[0] = 0
    batch = replace(batch, item_seq=item)
    CE()(model.train()(batch)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().score(replace(batch, item_seq=item * 0))[:, 1:].isfinite().all()


@ALL
@pytest.mark.parametrize("positions", ["all", "last"])
def test_positions(cls, positions):
    "Every event that is read is a target once, or the newest one of each row."
    batch = random_batch(40)
    p = build(cls, positions=positions)(batch)
    assert len(p.targets) == (int((batch.item_seq != 0).sum()) if positions == "all" else len(batch))


@pytest.mark.parametrize("cls", [Mamba4Rec, SIGMA])
def test_prefixes_ask_what_one_walk_asks(cls):
    "Same states, same targets, row by row; rows longer than max_len as well."
    batch = random_batch(40, B=4, L=9)
    for max_len in (50, 9, 5):
        a, b = (awake(build(cls, positions=p, max_len=max_len))(batch) for p in ("all", "prefixes"))
        n = len(a.targets)
        assert n == int((batch.item_seq[:, -max_len:] != 0).sum())
        if max_len >= 9: assert torch.equal(a.targets, b.targets) and torch.allclose(a.states, b.states, atol=1e-5)
        else: assert len(b.targets) >= n                # an old beginning is a row of its own: its label counts


@ALL
def test_runs_in_half_precision(cls):
    model, batch = build(cls), random_batch(40)
    with torch.autocast("cpu", torch.bfloat16):
        CE()(model(batch)).backward()
        assert model.score(batch).dtype == torch.float32


@ALL
def test_every_parameter_gets_a_gradient(cls):
    for changes in ({}, {"n_layers": 2}):
        model = awake(build(cls, **changes)).train()
        CE()(model(random_batch(40))).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@ALL
def test_scan_form_changes_nothing(cls):
    "Same weights, same scores, same gradients."
    batch, made = random_batch(40), []
    for form in FORMS:
        model = awake(build(cls, scan=form, dropout=0.))
        CE()(model(batch)).backward()
        made.append([model.score(batch)[:, 1:], *[p.grad for p in model.parameters()]])
    for other in made[1:]: assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made[0], other))


AROUND = [({}, False), ({"n_layers": 2}, True), ({"residual": "yes"}, True), ({"n_layers": 2, "residual": "no"}, False)]


@pytest.mark.parametrize("changes, around", AROUND)
def test_one_layer_has_no_way_around(changes, around):
    "A single layer that puts out nothing forgets the item; one of two does not; and as one asks for it."
    model = awake(build(Mamba4Rec, **changes))
    with torch.no_grad():
        for layer in model.layers: layer.mixer.out.weight.zero_()
    a, b = (model.states(torch.tensor([[1, 2, v]])) for v in (3, 4))
    assert torch.equal(a, b) is not around


# ---- SIGMA ----
def slow_sigma(block, x):
    "One row (L,D) without pads -> (L,D)."
    L, keep = len(x), block.flip_keep
    silu = lambda z: z * torch.sigmoid(z)
    gate = lambda p: block.gate_silu(silu(p)) + block.gate_sigmoid(torch.sigmoid(p))
    parts = [slow_mamba(block.mamba, x) * (1 + gate(x + block.ask(x)))]
    if block.form == "published":
        f = torch.cat([x[:max(0, L - keep)].flip(0), x[max(0, L - keep):]])
        parts.append(slow_mamba(block.mamba, f) * (1 + gate(f + block.ask_flipped(f))))
    near = (0, -1, -2) if block.form == "causal" else (1, 0, -1)
    heard = lambda t: sum(block.conv.weight[:, :, 2 - k] @ x[t + d] for k, d in enumerate(near) if 0 <= t + d < L)
    c = torch.stack([block.conv.bias + heard(t) for t in range(L)])
    parts.append(block.gru(c[None])[0][0])
    shares = block.shares if block.form == "published" else block.shares.softmax(0)
    return block.out(sum(s * p for s, p in zip(shares, parts)))


@pytest.mark.parametrize("form", ["causal", "published"])
@pytest.mark.parametrize("L", [3, 5, 6, 12])
def test_sigma_equals_slow_reference(form, L):
    torch.manual_seed(0)
    block = awake(SigmaBlock(20, 4, form=form).double(), .2)
    x = torch.randn(2, L, 20, dtype=torch.float64)
    y = block(x, torch.ones(2, L, dtype=torch.bool))
    for r in range(2): assert torch.allclose(y[r], slow_sigma(block, x[r]), atol=1e-10)


def test_sigma_published_refuses_all_positions():
    with pytest.raises(ValueError, match="the reversed past holds the answers"): build(SIGMA, form="published")
    for positions in ("prefixes", "last"): check_model(SIGMA, CE(), form="published", positions=positions)


def test_sigma_causal_does_not_leak():
    "C12: no later event in an earlier state; the published mixer has it there."
    for form, leaks in (("causal", False), ("published", True)):
        block = awake(SigmaBlock(16, 4, form=form))
        x, real = torch.randn(1, 12, 16), torch.ones(1, 12, dtype=torch.bool)
        later = x.clone(); later[:, 6:] += 1
        assert (float((block(x, real) - block(later, real))[:, :6].detach().abs().max()) > 1e-5) is leaks


@pytest.mark.parametrize("max_len", [8, 20, 50])
def test_flip_other_max_len(max_len):
    "The newest five events keep their places, whatever the length of the row and of its padding."
    for n in (1, 5, 6, 8):
        row = F.pad(torch.arange(1, n + 1), (max_len - n, 0))[None]
        old = max(0, n - 5)
        assert flip_old(row, row > 0, 5)[0, max_len - n:].tolist() == [*range(old, 0, -1), *range(old + 1, n + 1)]
        assert flip_old(row, row > 0, 5)[0, :max_len - n].eq(0).all()
    model = awake(build(SIGMA, form="published", positions="last", max_len=max_len))
    batch = random_batch(40, L=8)
    other = awake(build(SIGMA, form="published", positions="last", max_len=8))
    assert torch.allclose(model.score(widen(batch, max_len - 8))[:, 1:], other.score(batch)[:, 1:], atol=1e-5)


# ---- MBR-Mamba ----
def test_mbr_reduces_to_mamba4rec():
    "F = T = U = 0 and the last norm off."
    twin, batch = awake(build(Mamba4Rec)), random_batch(40)
    model = build(MBRMamba, query="given").eval()
    model.load_state_dict(twin.state_dict(), strict=False)
    with torch.no_grad(): model.behaviors.weight.zero_()
    assert not torch.allclose(model.score(batch)[:, 1:], twin.score(batch)[:, 1:])
    model.last_norm = torch.nn.Identity()
    assert torch.equal(model.score(batch), twin.score(batch))


@pytest.mark.parametrize("changes, sees", [
    ({}, True), ({"read_behavior": False}, True), ({"read_behavior": False, "delta": "scalar"}, True), ({"delta": "none"}, True),
    ({"read_behavior": False, "delta": "none"}, False)])
def test_behavior_changes_state(changes, sees):
    "From its event on, also with F = 0; the variant without F and T is blind."
    model, batch = awake(build(MBRMamba, **changes)), random_batch(40, full=True)
    L = batch.item_seq.shape[1]
    done = batch.behavior_seq.clone(); done[:, 4] = done[:, 4] % 3 + 1
    gap = (model.states(batch.item_seq, batch.behavior_seq, done) - model.states(batch.item_seq, done, done)).abs().amax((0, 2)) > 1e-6
    assert gap.tolist() == [False] * 4 + [sees] * (L - 4)


def test_delta_grows_with_its_addition():
    "A behavior with a large row of T overwrites the state."
    model, batch = build(MBRMamba).eval(), random_batch(40, full=True)
    with torch.no_grad(): model.clocks[0].weight[3] = 3.
    delta = model.mean_delta(batch)
    assert delta[3] > 2 * max(delta[1], delta[2]) and model.clocks[0].weight[0].abs().sum() == 0


def test_query_no_item_leak():
    "The question is the label's behavior, never its item: at every column, in training and in use."
    model, batch = awake(build(MBRMamba, query="given", dropout=0.)), random_batch(40, full=True)
    B, L = batch.item_seq.shape
    states = lambda b: model(b).states.view(B, L, -1)
    item = replace(batch, target=batch.target % 40 + 1)
    assert torch.equal(states(item), states(batch)) and torch.equal(model.score(item), model.score(batch))
    behavior = replace(batch, target_behavior=batch.target_behavior % 3 + 1)
    moved = (states(behavior) - states(batch)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * (L - 1) + [True]
    newest = batch.item_seq.clone(); newest[:, -1] = newest[:, -1] % 40 + 1
    assert torch.allclose(states(replace(batch, item_seq=newest))[:, :-1], states(batch)[:, :-1], atol=1e-6)
    unasked = awake(build(MBRMamba, query="none"))
    assert torch.equal(unasked.score(behavior), unasked.score(batch))


@pytest.mark.parametrize("cls", [MBRMamba, SigmaMuLe, GEAR, PBAT, MGPT])
def test_an_impression_asks_by_what_a_case_would_ask_by(cls):
    "Click, long_view, like of one impression: a lesson is told the like, though the click stands first; or else the strongest."
    kinds = ("click", "long_view", "like", "follow")
    done = [("click",), ("click", "like"), kinds, ("click", "long_view"), *[("click", "like")] * 3]
    log = [(user, f"i{(k + u) % 9}", kind, 100 * k) for u, user in enumerate("abcdef") for k, group in enumerate(done) for kind in group]
    log = pl.DataFrame(log, schema=["user", "item", "behavior", "timestamp"], orient="row").with_row_index("row")
    task = {"target": "like", "group": ("user", "item", "timestamp"), "behaviors": kinds}
    s = from_events(Events(log, "s", "made up", {}), name="impressions", **task)
    (batch,) = batches(s, s.train, 8, 50)
    told = lambda behaviors: [s.behaviors[b] for b in behaviors.view(len(batch), -1)[0]]
    assert told(asked_behaviors(batch)[:, 1:][next_items(batch) > 0]) == ["like", "like", "long_view", "like"]
    users = {"n_users": len(s.users)} if "n_users" in cls.Config.__dataclass_fields__ else {}
    model = cls(cls.Config.small(s.n_items, n_behaviors=s.n_behaviors, **users))
    model.prepare(s)
    if cls in (MBRMamba, SigmaMuLe):
        CE()(model(batch)).backward()
        moved = (model.query if cls is MBRMamba else model.sequence.query).weight.grad.abs().sum(1) > 0
        assert [s.behaviors[b] for b in moved.nonzero()[:, 0]] == ["long_view", "like"]
    elif cls is GEAR:
        steps = as_steps(batch)
        assert told(steps.behavior[steps.label > 0]) == ["like", "like", "long_view", "like"]
    elif cls is PBAT:
        item, behavior, label, real = model.slots(batch, .999)
        assert told(behavior[label > 0]) == ["click", "like", "like", "long_view", "like"]
    else:
        slots = cloze(batch, 50, s.n_items + 1, .999)
        assert told(slots.done[slots.label > 0]) == ["click", "like", "like", "long_view", "like"]
        assert slots.behavior.eq(0).all() and slots.label[:, -1].equal(batch.target)


def test_question_follows_the_data():
    "A data set that asks for certain behaviors has one; preparing twice keeps what was learned."
    model = build(MBRMamba)
    asks = types.SimpleNamespace(target_behaviors=(3,))
    model.prepare(asks)
    with torch.no_grad(): model.query.weight[1:] = 1.
    model.prepare(asks)
    assert model.query.weight[1:].eq(1).all() and model.query.weight[0].eq(0).all()
    model.prepare(types.SimpleNamespace(target_behaviors=()))
    assert model.query is None
    with pytest.raises(ValueError, match="query='always': expected 'auto', 'given' or 'none'"): build(MBRMamba, query="always")


def test_doctor_lets_a_question_have_a_behavior():
    "C12 forbids the target, not what is asked: where a data set asks for certain behaviors and the model says that it reads them."
    for target, told in (("buy", True), (None, False)):
        shop = datasets.load("toyshop-tiny", **({"target": target} if target else {}))
        for cls in (MBRMamba, GEAR):
            model = cls(cls.Config.small(shop.n_items, shop.n_behaviors))
            model.prepare(shop)
            assert ("target_behavior" in model.inputs) is told
            assert [card.severity for card in of_config._tried(model.eval(), shop)] == ["ok"] * 3
        peeks = MBRMamba(MBRMamba.Config.small(shop.n_items, shop.n_behaviors, query="given")).eval()      # reads it whether asked or not
        assert of_config._tried(peeks, shop)[0].severity == ("ok" if told else "E")


# ---- the toy shop ----
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba4rec", "sigma", "mbr_mamba"])
def test_above_markov_below_oracle(name, tmp_path):
    "The whole toy shop, the `small` preset in larger steps."
    config = configure(model=name, dataset="toyshop", epochs=12, patience=12, lr=3e-3, runs_dir=str(tmp_path), set="eval.bootstrap=200")
    result = run_experiment(config, say=lambda line: None)
    rule = {name: value["NDCG@10"] for name, value in result["baselines"].items()}
    print(f"{name}: {result['test']['NDCG@10']:.4f}; markov {rule['markov']:.4f}, oracle {rule['oracle']:.4f}")
    assert rule["markov"] < result["ci"]["NDCG@10"][0] and result["ci"]["NDCG@10"][1] < rule["oracle"]
