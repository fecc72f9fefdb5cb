"""The multimodal model: the known mistakes of its reports, its parts against slow versions, and every setting it accepts."""
import math
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mbnb import datasets
from mbnb.checks import awake, build, random_batch, random_items, widen
from mbnb.doctor import config as before, training
from mbnb.evaluators import protocols, ranks
from mbnb.fit import FitConfig, Stage, fit, partition, steps_per_epoch
from mbnb.losses.bpr import BPR
from mbnb.losses.ce import CE
from mbnb.models.mmq import (AUX, ENCODERS, FACTORS, MMQ, Config, DensityEncoder, StateEncoder, Unitary, ce_floor, distance_correlation,
                             divergence, entropy, modulus, orthogonality, overlaps, principal, shape_effects, unit)
from mbnb.sequences import collate, train_counts

WIDE = {"text_dim": 16, "attributes_dim": 12, "image_dim": 10}
FORMS = [{"unitary": "complex"}, {"readout": "modulus"}, {"encoder": "density"}, {"encoder": "linear"},
         {"positions": "last", "directions": 2, "gru_layers": 2}, {"recon": "pooled"}, {"diversity": "cosine"}, {"diversity": "distance"},
         {"causal": "scm"}, {"causal": "invariance"}, {"causal": "dice"}]
form = pytest.mark.parametrize("changes", [{}, *FORMS], ids=lambda c: "-".join(map(str, c.values())) or "small")


def some(n_items=40, B=6, L=7, seed=0, **more): return random_batch(n_items, B=B, L=L, seed=seed, **more)
def row(batch, b):
    return replace(batch, **{f.name: getattr(batch, f.name)[b:b + 1] for f in fields(batch) if f.name not in ("exclude", "extra")})


def pair(x): return torch.complex(*x.chunk(2, -1))
def stage(name="S", epochs=1, **weights): return Stage(name, epochs=epochs, loss_weights={k: weights.get(k, 0.) for k in AUX})


@pytest.fixture(scope="module")
def shop(): return datasets.load("toyshop-tiny")


# ---- the known traps, in the card's order ----

@form
def test_eval_is_deterministic(changes, shop):
    "Latent means are scored, whatever was drawn before; ranks asked twice are the same (C07b)."
    model = build(MMQ, n_items=shop.n_items, **changes).eval()
    batch = collate(shop, shop.valid, np.arange(20), 50)
    with torch.no_grad():
        z = model.score(batch)
        torch.rand(9)
        assert torch.equal(z, model.score(batch))
        codes = model.codes(torch.arange(9))
        assert torch.equal(codes.z, codes.mean) and not torch.equal(model.codes(torch.arange(9), sample=True).z, codes.mean)
        cases = shop.valid.take(np.arange(40))
        plan = protocols.make_plan(shop, cases, "full", seen_filter="none", split="valid")
        asked = [ranks.rank_cases(model.score, shop, cases, [plan], batch_size=16, max_len=50)[plan.name].g for _ in range(2)]
    assert before.stable(*asked).severity == "ok"


def test_ce_floor():
    "T=.2 keeps cross-entropy over Beauty above 4.41; the model warns, and says so in numbers. With .07 nothing stands in its way."
    for T, floor in ((.2, 4.41), (.1, .44), (.07, .008)):
        assert ce_floor(12_101, T) == pytest.approx(floor, abs=.006)
        z = torch.zeros(1, 12_101); z[0, 5] = 1
        assert float(F.cross_entropy(z / T, torch.tensor([5]))) == pytest.approx(ce_floor(12_101, T), abs=1e-4)
    small = {"d_state": 8, "d_out": 8, "gru_width": 8, "id_dim": 8, "hidden": (8, 8), "d_z": 4}
    with pytest.warns(UserWarning, match="12,101 items cannot fall below 4.41"): MMQ(Config(12_101, **small))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MMQ(Config.small(12_101, **small)); MMQ(Config(12_101, temperature=.1, **small))


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_unitary(kind):
    "Below 1e-5, and still after 100 steps of training."
    def off():
        re, im = model.interest.unitary.matrix()
        U = torch.complex(re, torch.zeros_like(re) if im is None else im)
        return float((U @ U.mH - torch.eye(len(U))).abs().max().detach())
    model, batch = build(MMQ, unitary=kind, n_states=8, gru_width=16, modalities=("id",)), some(B=2, L=4)
    model.on_epoch(stage(), 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    assert off() < 1e-5
    start = model.interest.unitary.weight.detach().clone()
    for _ in range(100):
        optimizer.zero_grad(); CE()(model(batch)).backward(); optimizer.step()
    assert off() < 1e-5 and float((model.interest.unitary.weight.detach() - start).abs().max()) > .02
    psi = model.interest.states(torch.randn(5, 48))
    assert torch.allclose(model.interest.unitary(psi).square().sum((0, 2)), psi.square().sum((0, 2)), atol=1e-4)        # nothing is lost


def test_skew_symmetric_in_the_complex_form_is_not_unitary():
    torch.manual_seed(0)
    A = torch.randn(16, 16) * .3; A = A - A.T
    U = torch.linalg.solve(torch.eye(16) - 1j * A, torch.eye(16) + 1j * A)
    assert float((U @ U.mH - torch.eye(16)).abs().max()) > .17


def test_user_cosine_at_init():
    "T12: through a modulus two random users point the same way before anything is learned."
    def mean_cosine(readout):
        model = build(MMQ, n_items=400, readout=readout).eval()
        p = model(some(400, B=60, L=12, full=True))
        return training.mean_cosine(p.states.detach().numpy())
    modulus, signed = mean_cosine("modulus"), mean_cosine("signed")
    assert modulus > .7 and abs(signed) < .35
    z = torch.randn(400, 64, dtype=torch.complex64)
    assert training.mean_cosine(z.abs().numpy()) == pytest.approx(math.pi / 4, abs=.01)


def test_modulus_gradient_at_zero():
    "T01: also a case without history, whose states are all zero, has a finite gradient; the square root alone has none."
    zero = torch.zeros(3, requires_grad=True)
    modulus(zero, zero).sum().backward()
    assert zero.grad.tolist() == [0.] * 3
    (zero * zero).sqrt().sum().backward()
    assert zero.grad.isnan().all()
    for changes in ({}, {"readout": "modulus"}, {"encoder": "density"}):
        model, batch = build(MMQ, positions="last", **changes), some()
        ids, place = model.slots(batch.item_seq * 0)
        codes = model.codes(ids)
        out, _, _ = model.answer([codes.z], codes.has, place, torch.arange(6), torch.zeros(6, dtype=torch.int64))
        out.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@form
def test_every_loss_term_has_gradient(changes):
    "T08: each term alone moves weights, by autograd.grad of that term; together they move all of them."
    model, batch = build(MMQ, **changes).train(), some(B=12)
    model.mean.normal_(); model.count.copy_(torch.rand(41))
    awake(model).train()
    p = model(batch)
    terms = {"main": CE()(p)} | p.aux
    assert set(p.aux) == set(AUX) and all(v.isfinite() for v in terms.values())
    dead = {"diversity", "orthogonality"} if changes.get("encoder") == "linear" else set()
    named = dict(model.named_parameters())
    moved = set()
    for name, term in terms.items():
        if name in dead: assert not term.requires_grad; continue
        grads = torch.autograd.grad(term, named.values(), retain_graph=True, allow_unused=True)
        live = {n for n, g in zip(named, grads) if g is not None and g.any()}
        assert live, name
        moved |= live
    assert moved == set(named)
    found = training.gradient_terms({k: v for k, v in terms.items() if k not in dead}, model.parameters())
    assert set(found["ratio"]) == set(AUX) - dead and all(math.isfinite(v) for v in found["cosine"].values())


def test_shape_effects_have_gradient():
    "The order of doses, which was asked for through a sign, pushes; each of the four terms does."
    ite = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for term in shape_effects(ite):
        g, = torch.autograd.grad(term, ite, retain_graph=True)
        assert g.isfinite().all() and g.any()
    sign, = torch.autograd.grad((ite[1].sign() - ite[0].sign()).abs().mean(), ite)
    assert not sign.any()


def test_negatives_exclude_target():
    "BPR's negatives are none of the user's own items (C01); those of the causal term are not the target, and its own items do not count."
    model, batch = build(MMQ).train(), some(B=200, L=9)
    p = model(batch)
    assert bool((p.exclude == p.targets[:, None]).any(1).all())
    seen = set()
    for _ in range(60):
        v, ok = model.drawn(p)
        assert (v != p.targets).all() and v.min() >= 1 and v.max() <= 40
        assert not (p.exclude[ok] == v[ok][:, None]).any()
        seen |= set(v.tolist())
    assert len(seen) == 40
    assert before.negatives(4, 12_101, 8.9, True).severity == "ok"


@pytest.mark.parametrize("loss,expected", [(BPR(n_neg=4), math.log(2)), (CE(), math.log(500))], ids=["bpr", "ce"])
@pytest.mark.parametrize("changes", [{}, {"encoder": "density"}, {"encoder": "linear"}], ids=["states", "density", "linear"])
def test_init_loss(loss, expected, changes):
    "C09: in spite of a temperature of .07. The plan's .8-1.2 for BPR is worse than chance."
    model, batch = build(MMQ, n_items=500, **changes).eval(), some(500, B=60)
    value = float(loss(model(batch), torch.Generator().manual_seed(0)).detach())
    assert value == pytest.approx(expected, rel=.05)
    assert [before.initial_loss(x, expected).severity for x in (value, expected * 1.3)] == ["ok", "W"]


def test_weights_stand_in_one_place():
    "C18: a weight is a setting of the stage alone, and every stage names all. C17: `ce` and `published` differ as the report's runs do."
    assert all(isinstance(getattr(Config(9), k), str) for k in ("recon", "causal", "diversity")) and not hasattr(Config(9), "orthogonality")
    for preset in MMQ.PRESETS.values():
        for s in preset["stages"]: assert set(s["loss_weights"]) == set(AUX)
    published, ce = MMQ.PRESETS["published"], MMQ.PRESETS["ce"]
    assert [s["epochs"] for s in published["stages"]] == [10, 20, 20]
    assert [s["loss_weights"]["causal"] for s in published["stages"]] == [0, .001, .0005]
    assert [list(s["loss_weights"].values()) for s in ce["stages"]] == [[.1, .2, .05, 0]]
    assert (ce["stages"][0]["lr"], ce["fit"]["tokens"], published["fit"]["tokens"]) == (5e-4, 512, 256)
    assert [s["epochs"] for s in MMQ.PRESETS["small"]["stages"]] == [4, 8, 8]
    assert [s["loss_weights"] for s in MMQ.PRESETS["small"]["stages"]] == [s["loss_weights"] for s in published["stages"]]
    assert Config.ce(9) == Config(9)


@torch.no_grad()
def test_init_kept():
    "The encoders' start is not overwritten by a later one: small spread, no biases, and users and items in different halves."
    model = build(MMQ)
    for e in model.encoders.values():
        assert float(e.spread.bias.mean()) == -3 and float(e.spread.weight.std()) < .02 and not e.mean.bias.any()
    codes = model.codes(torch.arange(41))
    assert float((codes.spread / 2).exp().mean()) == pytest.approx(.22, abs=.02)
    p = model.eval()(some())
    assert float((p.states @ p.table.T).detach().abs().max()) < .07 * 14
    halves = [float(x.detach().square().mean().sqrt()) for x in (p.table[:, :32], p.table[:, 32:], p.states[:, :32], p.states[:, 32:])]
    assert halves[0] < .1 * halves[1] and halves[3] < .1 * halves[2]
    other = build(MMQ, readout="modulus").items.weight.detach()
    assert float(other[:, :32].std() / other[:, 32:].std()) == pytest.approx(1, abs=.1)
    assert not model.items.weight[0].any() and not model.ids.weight[0].any()


def test_lr_restarts_per_stage(shop):
    "Each stage has a new optimizer and a schedule of its own; frozen encoders wake up with it, from the best weights so far."
    model, weights = MMQ(Config.small(shop.n_items, gru_width=16)), dict.fromkeys(AUX, 0.)
    stages = [Stage("A", epochs=1, lr=1e-3, warmup=3, freeze=("encoders",), loss_weights=weights),
              Stage("B", epochs=1, lr=2e-3, warmup=2, loss_weights=weights)]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [n for n in start if n.startswith("encoders") and "spread" not in n]
    step, moved, flat = {}, {}, {"value": 0., "error": .1, "metrics": {}}
    for r in fit(model, {None: CE()}, shop, stages, FitConfig(batch_size=50), lambda *_: flat, max_len=8):
        if r["kind"] == "step":
            step.setdefault(r["stage"], []).append(r["lr"])
            moved.setdefault(r["stage"], [n for n in trained if not torch.equal(model.get_parameter(n), start[n])])
    assert step["A"] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3]) and step["B"] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3])
    assert moved["A"] == [] and moved["B"] == trained


@form
def test_score_independent_of_batch(changes):
    "A row scores alone as it does beside others, with any pads, statistics and interventions too; in float64, free of rounding."
    model, batch = awake(build(MMQ, **changes)).double(), some(B=5, L=9)
    with torch.no_grad():
        z = model.score(batch)
        for b in range(5):
            assert float((model.score(widen(row(batch, b), b)) - z[b])[:, 1:].abs().max()) <= 1e-6
        codes, alone = model.codes(torch.tensor([3, 5, 7])), model.codes(torch.tensor([5]))
        if changes.get("causal", "intervention") in ("intervention", "scm"):
            torch.manual_seed(0); many = model.interventions(codes)
            torch.manual_seed(0); one = model.interventions(alone)
            for a, b in zip(many, one): assert torch.allclose(a[:, 1:2], b, atol=1e-6)


def test_entropy_instead_of_purity():
    "A pure state has purity 1 by definition; what is shown tells mixtures apart."
    alike, one = torch.full((4, 3), .25), torch.eye(4)[:, :1].repeat(1, 3)
    basis = F.pad(torch.eye(4), (0, 4))[:, None].repeat(1, 3, 1)
    same = basis[:1].repeat(4, 1, 1)
    assert [entropy(alike), entropy(one), entropy(alike, basis), entropy(alike, same)] == pytest.approx([1, 0, 1, 0], abs=1e-4)
    p, psi = torch.rand(3, 5).softmax(0), unit(torch.randn(3, 5, 12))
    rho = torch.einsum("mn,mnd,mne->nde", p.to(torch.complex64), pair(psi), pair(psi).conj())
    eig = torch.linalg.eigvalsh(rho).clamp(min=1e-12)
    assert entropy(p, psi) == pytest.approx(float(-(eig * eig.log()).sum(1).mean() / math.log(3)), abs=1e-4)


def test_modality_dropout():
    "C13: permuting any modality that is declared moves the logits; one that is switched off, or that no item has, moves nothing."
    batch = some()
    for used in (("text", "attributes", "image", "id"), ("text", "id"), ("image",)):
        model = awake(build(MMQ, modalities=used))
        with torch.no_grad():
            z = model.score(batch)
            for m in used:
                table = model.ids.weight if m == "id" else getattr(model, m)
                old = table.clone()
                table[1:] = old[1:].flip(0)
                assert float((model.score(batch) - z)[:, 1:].abs().max()) > 1e-4, m
                table.copy_(old)
        assert not any(hasattr(model, m) for m in {"text", "image"} - set(used))
    model = awake(build(MMQ))
    with torch.no_grad():
        model.has_image.zero_()
        z = model.score(batch)
        model.image.normal_()
        assert torch.equal(z, model.score(batch))


def test_missing_is_masked():
    "What stands in the row of a missing item is not read; the item is its other modalities; one without any is zero."
    model = awake(build(MMQ, modalities=("text", "image")))
    ids, both = torch.arange(41), model.has_text & model.has_image
    x = model.fuse(model.codes(ids).z, model.codes(ids).has)[0]
    model.text[~model.has_text] = 50.
    assert torch.equal(x, model.fuse(model.codes(ids).z, model.codes(ids).has)[0]) and not model.has_text.all()
    assert bool(x[~(model.has_text | model.has_image)].eq(0).all()) and x[1:][both[1:]].any(1).all()
    alone = awake(build(MMQ, modalities=("text",)))
    share = alone.fuse(alone.codes(ids).z, alone.codes(ids).has)[1]
    assert alone.query is None and torch.equal(share[0], alone.has_text[:, None].expand(41, 3).float())


def test_kl_reported(shop):
    "A factor that was given up shows: its KL is 0, at the floor that is free. The others are the mean KL of their dimensions."
    model = build(MMQ, n_items=shop.n_items)
    model.prepare(shop, random_items(shop.n_items))
    for e in model.encoders.values():
        with torch.no_grad():
            for part in (e.mean, e.spread): part.weight[16:32] = 0; part.bias[16:32] = 0
    values = model.watch_values()
    assert set(values) == {*(f"kl_{f}" for f in FACTORS), *(f"share_{m}" for m in model.present), "entropy"}
    assert values["kl_aesthetics"] == 0 and values["kl_function"] > .5 and 0 < values["entropy"] <= 1
    codes = model.catalogue()
    own, standard = torch.distributions.Normal(codes.mean, (codes.spread / 2).exp()), torch.distributions.Normal(0., 1.)
    assert torch.allclose(torch.distributions.kl_divergence(own, standard), divergence(codes.mean, codes.spread), atol=1e-5)
    assert sum(values[f"share_{m}"] for m in model.present) == pytest.approx(1, abs=1e-5) and model.training


# ---- parts against slow versions ----

@pytest.mark.parametrize("kind", ["real", "complex"])
def test_states_equal_slow_reference(kind):
    "The whole encoder with complex numbers, row by row, head by head."
    torch.manual_seed(0)
    c = Config.small(9, unitary=kind, d_state=8, d_out=6, n_heads=2, n_states=3)
    enc, u = StateEncoder(5, c).double(), torch.randn(4, 5, dtype=torch.float64)
    for p in enc.parameters(): p.data.normal_()
    out, psi, share = enc(u[None])
    re, im = enc.unitary.matrix()
    U = torch.complex(re, torch.zeros_like(re) if im is None else im).to(torch.complex128)
    W, M = torch.complex(enc.attention.qkv.re, enc.attention.qkv.im), torch.complex(enc.measure.re, enc.measure.im)
    for n in range(4):
        states = []
        for k in range(3):
            z = torch.complex(u[n] @ enc.amplitude[k, :, :8], u[n] @ enc.amplitude[k, :, 8:])
            z = z * torch.exp(1j * math.pi * torch.tanh(u[n] @ enc.phase[k]))
            states.append(z / z.abs().square().sum().sqrt())
        x = torch.stack(states)
        assert torch.allclose(pair(psi[:, n]), x, atol=1e-6)
        x = U @ x
        q, k, v = (x @ W).split(8, 1)
        heads = [((q[:, s] @ k[:, s].mH).abs() / 2).softmax(1).to(v.dtype) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
        m = torch.stack([y @ M[k] for k, y in enumerate(x + torch.cat(heads, 1))])
        p = m.abs().mean(1).softmax(0)
        s = (p[:, None] * m).sum(0)
        assert torch.allclose(share[:, n], p, atol=1e-6) and torch.allclose(out[n], enc.out(torch.cat([s.real, s.imag])), atol=1e-5)


@torch.no_grad()
def test_density_is_a_measurement():
    "Odds of all outcomes are not negative and sum to 1, whatever the basis."
    for kind in ("real", "complex"):
        enc = DensityEncoder(12, Config.small(9, unitary=kind, d_state=16), 3)
        torch.nn.init.normal_(enc.basis.weight)
        _, psi, p = enc(torch.randn(3, 20, 12))
        y = enc.odds(psi, p)
        assert float(y.min()) >= 0 and torch.allclose(y.sum(1), torch.ones(20), atol=1e-4)


def test_linear_has_the_same_size():
    for c in (Config.small(9), Config(9, temperature=.1)):
        a, b = (sum(p.numel() for p in ENCODERS[k](3 * c.d_z, c).parameters()) for k in ("states", "linear"))
        assert abs(a / b - 1) < .01


def test_prefixes_equal_one_walk():
    "Every prefix read by itself, or all of them in one walk: the same lessons, states and gradients."
    a, batch = awake(build(MMQ)), some(L=9)
    b = awake(build(MMQ, positions="last"))
    b.load_state_dict(a.state_dict())
    found = []
    for model in (a, b):
        model.on_epoch(stage(), 0)
        p = model(batch)
        CE()(p).backward()
        found.append((p.states.detach(), p.targets, p.exclude, *[q.grad for q in model.parameters() if q.grad is not None]))
    assert len(found[0][1]) == int(batch.length.sum()) and len(found[0]) == len(found[1])
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(*found))
    with torch.no_grad(): assert float((a.score(batch) - b.score(batch))[:, 1:].abs().max()) < 1e-4


def test_only_labeled_positions():
    "A data set of growing prefixes asks for the newest event alone."
    batch = some()
    mask = torch.zeros_like(batch.item_seq, dtype=torch.bool); mask[:, -1] = True
    for positions in ("all", "last"):
        p = build(MMQ, positions=positions)(replace(batch, extra={"label_mask": mask}))
        assert torch.equal(p.targets, batch.target)


def test_events_beyond_max_len_are_not_read():
    model, batch = awake(build(MMQ, max_len=6)), some(L=6, full=True)
    front = lambda x: torch.cat([x[:, :4] * 0 + 7, x], 1)
    longer = replace(batch, **{k: front(getattr(batch, k)) for k in ("item_seq", "behavior_seq", "time_seq")}, length=batch.length + 4)
    with torch.no_grad(): assert torch.equal(model.score(batch), model.score(longer))
    assert len(model(longer).targets) == 6 * 6


def test_distinct_items_are_encoded_once():
    "One sample of an item a batch, wherever it stands; only items of the batch are encoded."
    model, batch, asked = build(MMQ).train(), some(B=50, L=9), []
    codes = model.codes
    model.codes = lambda ids, *a: asked.append(ids) or codes(ids, *a)
    model(batch)
    assert len(asked) == 1 and torch.equal(asked[0], batch.item_seq.unique())


# ---- terms ----

def test_overlap_by_hand():
    psi = unit(torch.randn(3, 6, 10))
    z, (re, im) = pair(psi), overlaps(psi)
    total = ortho = 0.
    for n in range(6):
        for k in range(3):
            for m in range(3):
                inner = (z[k, n].conj() * z[m, n]).sum()
                assert torch.allclose(torch.complex(re, im)[n, k, m], inner, atol=1e-5)
                if k != m: total += float(inner.abs() ** 2) / 36; ortho += float(inner.real ** 2) / 6
    assert float(build(MMQ).diversity_of(psi)) == pytest.approx(total, abs=1e-5)
    assert float(orthogonality(psi)) == pytest.approx(ortho, abs=1e-4)


def test_distance_correlation_by_hand():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 4, generator=g)
    rotated = a @ torch.linalg.qr(torch.randn(4, 4, generator=g))[0] * 3
    free = torch.randn(60, 4, generator=g)
    same, none = (float(distance_correlation(torch.stack(x))) for x in ([a, rotated], [a, free]))
    assert same == pytest.approx(1, abs=1e-3) and none < .3

    def centered(x):
        d = (x[:, None] - x[None]).norm(dim=2)
        return d - d.mean(0) - d.mean(1)[:, None] + d.mean()
    A, B = centered(a), centered(free)
    assert none == pytest.approx(float((A * B).mean() / ((A * A).mean() * (B * B).mean()).sqrt()), abs=1e-4)


def test_recon_counts_who_has():
    "The error is a mean over the items that have the table; KL has its free bits, and the weight that the age gives."
    model, ids = build(MMQ, modalities=("text",)).eval(), torch.arange(41)
    codes = model.codes(ids)
    error = (model.decoders["text"](codes.z[0].flatten(1)) - model.goal_text).square().mean(1)[model.has_text].mean()
    kl = divergence(codes.mean, codes.spread)[0][model.has_text].clamp(min=.02).mean()
    assert float(model.recon(codes, ids).detach()) == pytest.approx(float((error + .1 * kl).detach()), rel=1e-5)
    for epoch, share in ((0, 0.), (1, .2), (2, .4)):
        model.on_epoch(stage("A", recon=1.), epoch)
        assert float(model.recon(codes, ids).detach()) == pytest.approx(float((error + .1 * share * kl).detach()), rel=1e-5)


def test_free_bits_do_not_push():
    model = build(MMQ, modalities=("text",))
    codes = model.codes(torch.arange(41))
    mean, spread = torch.full_like(codes.mean, .1).requires_grad_(), torch.zeros_like(codes.spread).requires_grad_()        # .005 nats
    low = replace(codes, mean=mean, spread=spread)
    model.recon(low, torch.arange(41)).backward()
    assert not mean.grad.any() and not spread.grad.any()
    high, published = torch.full_like(codes.mean, 5.).requires_grad_(), build(MMQ, modalities=("text",), recon="pooled")    # 12.5 nats
    published.recon(replace(codes, mean=high, spread=spread.detach(), z=codes.z.detach()), torch.arange(41)).backward()
    assert not high.grad.any()


def test_intervention_by_hand():
    "The effect of a modality on the right and on a drawn item."
    model, batch = awake(build(MMQ, dropout=0.)), some()
    model.refresh()
    torch.manual_seed(4); p = model(batch)
    torch.manual_seed(4); k = int(torch.randint(4, ()))
    other, ok = model.drawn(p)
    ids, place = model.slots(batch.item_seq)
    codes, (r, column) = model.codes(ids), (model.slots(batch.item_seq)[0][place] > 0).nonzero(as_tuple=True)
    z = codes.z.clone(); z[k] = model.mean[k]
    was, would = (model.answer([x], codes.has, place, r, column + 1)[0][0] @ p.table.T / .07 for x in (codes.z, z))
    at = torch.arange(len(r))
    effect = (was - would)[at, p.targets] - (was - would)[at, other]
    assert float(p.aux["causal"].detach()) == pytest.approx(float(F.softplus(-effect)[ok].mean().detach()), rel=1e-4)


def test_mean_is_the_training_set_s(shop):
    "Over the items that occur in training and have the modality, each once; renewed when an epoch begins, not within."
    model = build(MMQ, n_items=shop.n_items)
    model.prepare(shop, random_items(shop.n_items))
    model.on_epoch(stage("A", causal=1.), 0)
    rows = torch.arange(shop.n_items + 1)[torch.from_numpy(train_counts(shop) > 0) & model.has_text]
    codes = model.eval().codes(rows)
    assert torch.allclose(model.mean[0, 0], codes.mean[0].mean(0), atol=1e-5)
    assert torch.allclose(model.spread[0, 0], codes.mean[0].std(0, correction=0), atol=1e-4)
    old = model.mean.clone()
    torch.nn.init.normal_(model.encoders["text"].mean.weight)
    model.on_epoch(stage("A", causal=1.), 0)
    assert torch.equal(model.mean, old)
    model.on_epoch(stage("A", causal=1.), 1)
    assert not torch.equal(model.mean, old)


def test_counts(shop):
    "Inputs and targets of training, and nothing that is held out."
    n = np.zeros(shop.n_items + 1)
    for a, b, y in zip(shop.train.start, shop.train.stop, shop.train.target):
        for v in [*shop.item[a:b], y]: n[v] += 1
    assert train_counts(shop).tolist() == n.tolist()


def test_invariance_pulls():
    "Trained on the nuisance term alone, the distribution stops depending on that modality."
    model, batch = build(MMQ, causal="invariance", nuisance="text", dropout=0.), some()
    awake(model).train()
    model.refresh()
    optimizer, values = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(30):
        value = model(batch).aux["causal"]
        optimizer.zero_grad(); value.backward(); optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < .3 * values[0]


# ---- stages, tables, settings ----

def test_terms_without_weight_are_not_computed():
    model, batch = build(MMQ).train(), some()
    for on in AUX:
        model.on_epoch(stage("A", **{on: 1.}), 0)
        aux = model(batch).aux
        assert {k for k, v in aux.items() if v.requires_grad} == {on} and all(float(v) == 0 for k, v in aux.items() if k != on)
    model.interventions = lambda codes: pytest.fail("walked for nothing")
    model.terms = lambda *a: dict.fromkeys(AUX, lambda: pytest.fail("computed for nothing"))
    model.weights = dict.fromkeys(AUX, 0.)
    with pytest.raises(pytest.fail.Exception): model(batch)
    model.interventions = lambda codes: []
    model(batch)


def test_age_travels_with_the_weights():
    "An epoch that goes on after a resume is not counted twice; a stage from older weights is as old as they are."
    model = build(MMQ)
    for epoch in range(3): model.on_epoch(stage("A"), epoch)
    old, again = {k: v.clone() for k, v in model.state_dict().items()}, build(MMQ, seed=1)
    again.load_state_dict(old)
    again.on_epoch(stage("A"), 2)
    assert int(again.age[2]) == 2 and again.beta_now() == pytest.approx(.1 * 2 / 5)
    for epoch in range(3, 9): model.on_epoch(stage("A"), epoch)
    assert model.beta_now() == pytest.approx(.1)
    model.load_state_dict(old)
    model.on_epoch(stage("B"), 0)
    assert int(model.age[2]) == 3


def test_tables_do_not_travel_with_the_weights():
    model = build(MMQ)
    assert not {k for k in model.state_dict() if k.startswith(("text", "attributes", "image", "has_", "goal_", "count"))}
    again = MMQ(model.config)
    again.load_state_dict(model.state_dict())
    assert again.eval().score(some())[:, 1:].isfinite().all()        # no table yet: ids speak
    again.prepare(None, random_items(40)); again.prepare(None, random_items(40))
    with torch.no_grad(): assert torch.equal(again.score(some()), model.eval().score(some()))


def test_a_table_that_does_not_fit():
    model = MMQ(Config.small(40, text_dim=17))
    with pytest.raises(ValueError, match=r"table 'text': found \(41, 16\), expected \(41, 17\)"): model.prepare(None, random_items(40))
    with pytest.raises(ValueError, match=r"found \(42, 16\)"): MMQ(Config.small(40, text_dim=16)).prepare(None, random_items(41))


def test_principal_components():
    "As the singular value decomposition finds them, of those rows alone; nothing to learn from gives nothing."
    x, rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3 > 0
    y = x - x[rows].mean(0)
    v = torch.linalg.svd(y[rows])[2][:2]
    slow = y @ v.T
    slow = slow / slow[rows].square().mean().sqrt()
    assert torch.allclose(principal(x, rows, 2).abs(), slow.abs(), atol=1e-4)
    assert not principal(x, rows & False, 2).any()


@form
def test_trains_and_presets(changes):
    "Every form learns a batch, stays finite in bfloat16, and its parameters are parted by the stages of every preset."
    model, batch = build(MMQ, **changes).train(), some()
    optimizer, first = torch.optim.Adam(model.parameters(), 1e-2), None
    for _ in range(12):
        p = model(batch)
        value = CE()(p)
        first = first or float(value.detach())
        optimizer.zero_grad(); (value + .01 * sum(p.aux.values())).backward(); optimizer.step()
    assert float(value.detach()) < .9 * first and all(p.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        p = model(batch)
        (CE()(p) + sum(p.aux.values())).backward()
        assert model.score(batch).dtype == torch.float32 and all(q.grad is None or q.grad.isfinite().all() for q in model.parameters())
    for preset in MMQ.PRESETS.values():
        for s in preset["stages"]: assert set(partition(model, Stage(**s)).values()) == {0}


def test_wrong_values():
    wrong = [({"encoder": "quantum"}, "encoder='quantum': expected 'states', 'density' or 'linear'"),
             ({"readout": "abs"}, "readout='abs'"), ({"directions": 2}, "the way back has read the answers"),
             ({"n_states": 1}, "n_states=1"), ({"temperature": 0.}, "temperature=0"), ({"n_heads": 5}, "not a multiple"),
             ({"modalities": ("txt",)}, "'txt' is unknown"), ({"modalities": ()}, "the data has none"),
             ({"causal": "invariance", "nuisance": "sound"}, "nuisance='sound'")]
    for changes, says in wrong:
        with pytest.raises(ValueError, match=says): build(MMQ, **changes)
    with pytest.raises(ValueError, match="nuisance='image'"): MMQ(Config.small(9, causal="invariance"))
    with pytest.raises(ValueError, match="the data has none"): MMQ(Config.small(9, modalities=("text",)))


@torch.no_grad()
def test_unitary_at_large_weights():
    for kind in ("real", "complex"):
        U = Unitary(16, kind); torch.nn.init.normal_(U.weight, std=10.)
        re, im = U.matrix()
        z = torch.complex(re, torch.zeros_like(re) if im is None else im)
        assert float((z @ z.mH - torch.eye(16)).abs().max()) < 1e-5


@pytest.mark.real_data
def test_beauty_epochs_are_the_report_s(shared_data):
    "513 batches of at most 256 prefixes, 254 of 512: the warm-ups of the presets are three and five epochs."
    beauty = datasets.load("beauty")
    for preset, epochs in (("published", 3), ("ce", 5)):
        p = MMQ.PRESETS[preset]
        assert p["stages"][0]["warmup"] == epochs * steps_per_epoch(beauty, FitConfig(**p["fit"]), 50)
