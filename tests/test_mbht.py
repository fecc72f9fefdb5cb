"MBHT: the batched hypergraph against a slow loop over rows, the two forms, and the traps that its page does not show."
import math
from dataclasses import replace

import pytest
import torch

from mbnb.checks import awake, build, random_batch, widen
from mbnb.layers import cloze, right_padded
from mbnb.losses.ce import CE
from mbnb.models.mbht import MBHT, Hypergraph, incidence, newest, pool, readout, similarity, spread
from mbnb.sequences import Batch

MASK = 99
PLAIN = dict(dropout=0., hyper_dropout=0.)
KINDS = dict(pool="strided", sim="published", readout="published"), dict(pool="window", sim="cosine", readout="clean")


def batch_of(rows, behaviors=None, L=None, target=1):
    "Lists of item ids -> Batch, left-padded to L."
    L = L or max(1, max(map(len, rows)))
    item = torch.tensor([[0] * (L - len(r)) + list(r) for r in rows])
    kind = torch.tensor([[0] * (L - len(r)) + list(r) for r in behaviors]) if behaviors else (item > 0).long()
    B = len(rows)
    one = torch.ones(B, dtype=torch.int64)
    return Batch(item, kind, (item > 0).cumsum(1), (item > 0).sum(1), one, one * target, one, one, torch.arange(B))


def random_rows(lengths, n_items=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, n_items + 1, (n,), generator=g).tolist() for n in lengths]


def loop_hypergraph(items, s, k, repeat_edges=True):
    "One row, no padding: edges slot by slot, item by item. Items (n) and similarities (n,n) -> H (n,edges), G (n,n)."
    n, H = len(items), {}
    for i in range(n):
        if items[i] != MASK:
            for j in sorted(range(n), key=lambda j: -s[i, j])[:k]:
                edge = items[i] if items[j] == MASK else items[j]
                H[i, edge] = max(H.get((i, edge), 0.), .01 if s[i, j] < 0 else float(s[i, j]))
    for i in range(n):
        H[i, items[i]] = 1.
        if repeat_edges and items.count(items[i]) > 1 and items[i] != MASK: H[i, "again", items[i]] = 1.
    edges = list(dict.fromkeys(key[1:] for key in H))
    M = torch.zeros(n, len(edges), dtype=torch.float64)
    for key, w in H.items(): M[key[0], edges.index(key[1:])] = w
    G = torch.diag(1 / M.sum(1)) @ M @ torch.diag(1 / M.sum(0)) @ M.T
    return M, G


def loop_readout(y, masked, holes, window, kind):
    "One row, no padding, hole by hole."
    n, y = len(y), y.clone()
    given = y.clone()
    for pos in [t for t in range(n) if holes[t]]:
        before, after = range(max(0, pos - window[0]), pos), range(pos + 1, min(pos + window[1], n))
        if kind == "clean":
            near = [t for t in (*before, *after) if not masked[t]]
            if near: y[pos] = given[near].mean(0)
        elif pos > 0:
            end = pos + window[1] if pos + window[1] < n else n - 1
            y[pos] = torch.cat([y[max(0, pos - window[0]):pos], y[pos + 1:end]]).mean(0)
    return y


def cases_with_holes(D=6, seed=0):
    "Rows of 1..60 slots with repeats and several MASKs, left-padded: items (B,T), real (B,T), vectors (B,T,D), one an item."
    g = torch.Generator().manual_seed(seed)
    lengths = [1, 1, 2, 3, 4, 5, 7, 11, 17, 25, 33, 48, 60]
    item = torch.zeros(len(lengths), 60, dtype=torch.int64)
    for b, n in enumerate(lengths):
        item[b, -n:] = torch.randint(1, 3 + n // 2, (n,), generator=g)
        item[b, -n:][torch.rand(n, generator=g) < .2] = MASK
        item[b, -1] = MASK
    table = torch.randn(100, D, generator=g, dtype=torch.float64)
    real = item > 0
    return item, real, table[item] * real[..., None]


# ---- the hypergraph ----

@pytest.mark.parametrize("sim", ["published", "cosine"])
@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("repeat_edges", [True, False])
def test_hypergraph_equals_loop(sim, k, repeat_edges):
    item, real, u = cases_with_holes()
    s = similarity(u, sim)
    g = torch.Generator().manual_seed(5)
    s = s + torch.rand(100, 100, generator=g, dtype=torch.float64)[item[:, :, None], item[:, None, :]] * 1e-3    # breaks ties
    G = spread(incidence(item, real, MASK, s, k, repeat_edges))
    for b in range(len(item)):
        n = int(real[b].sum())
        _, slow = loop_hypergraph(item[b, -n:].tolist(), s[b, -n:, -n:], k, repeat_edges)
        assert (G[b, -n:, -n:] - slow).abs().max() < 1e-6
        assert G[b, :-n].abs().sum() == 0 and G[b, :, :-n].abs().sum() == 0


def test_hypergraph_moves_with_its_row():
    "Right-padded, the same row has the same edges."
    item, real, u = cases_with_holes()
    n = int(real[9].sum())
    left, right = torch.zeros_like(item[9:10]), torch.zeros_like(item[9:10])
    left[0, -n:] = right[0, :n] = item[9, -n:]
    s_left, s_right = torch.zeros(2, 1, 60, 60, dtype=u.dtype)
    s_left[0, -n:, -n:] = s_right[0, :n, :n] = similarity(u[9:10, -n:], "cosine")[0]
    a, b = (spread(incidence(x, x > 0, MASK, s, 4)) for x, s in ((left, s_left), (right, s_right)))
    assert (a[0, -n:, -n:] - b[0, :n, :n]).abs().max() < 1e-12


def test_mask_in_no_hyperedge():
    item, real, u = cases_with_holes()
    H = incidence(item, real, MASK, similarity(u, "cosine"), 6)
    T = item.shape[1]
    for b in range(len(item)):
        holes = item[b] == MASK
        column = int(holes.nonzero()[0])
        assert H[b, holes].sum() == holes.sum() and (H[b, holes, column] == 1).all()         # a hole joins the column of MASK alone
        assert H[b, ~holes][:, [column, T + column]].sum() == 0                              # and nobody else joins it
    G = spread(H)
    hidden = item == MASK
    assert G[hidden[:, :, None] != hidden[:, None, :]].abs().sum() == 0


@pytest.mark.parametrize("preset", ["small", "published"])
def test_target_not_in_graph(preset):
    "With the same holes another target changes no edge and no state, neither in training nor in scoring."
    model = awake(build(MBHT, preset=preset, max_len=19, **PLAIN))
    batch = random_batch(40, full=True)
    other = replace(batch, target=batch.target % 40 + 1, target_behavior=batch.target_behavior % 3 + 1)
    out = []
    for x in (batch, other):
        torch.manual_seed(3)
        out.append(model(x))
    assert torch.equal(out[0].states, out[1].states) and not torch.equal(out[0].targets, out[1].targets)
    assert torch.equal(model.score(batch), model.score(other))


def test_hidden_items_are_out_of_sight():
    "What stands behind a hole of the history changes no state either."
    model = awake(build(MBHT, max_len=19, mask_prob=.5, **PLAIN))
    batch = random_batch(40, full=True)
    torch.manual_seed(3)
    hidden = cloze(batch, 19, 41, .5, 10).masked[:, :-1]
    assert hidden.any()
    other = replace(batch, item_seq=torch.where(hidden, batch.item_seq % 40 + 1, batch.item_seq))
    out = []
    for x in (batch, other):
        torch.manual_seed(3)
        out.append(model(x).states)
    assert torch.equal(*out)


def test_similarity_is_cosine():
    g = torch.Generator().manual_seed(0)
    u = torch.randn(3, 9, 16, generator=g) * 50
    s = similarity(u, "cosine")
    assert s.abs().max() <= 1 + 1e-5
    assert torch.allclose(s[1, 2, 5], torch.nn.functional.cosine_similarity(u[1, 2], u[1, 5], dim=0), atol=1e-6)
    assert torch.allclose(s.diagonal(dim1=1, dim2=2), torch.ones(3, 9), atol=1e-5)
    assert similarity(u, "published").abs().max() > 1                                        # over time: not a cosine


def test_no_repeated_item_leaves_second_half_empty():
    item = torch.tensor([[0, 0, 3, 5, 8, MASK], [1, MASK, 2, MASK, 4, MASK]])
    H = incidence(item, item > 0, MASK, torch.rand(2, 6, 6), 3)
    assert H[:, :, 6:].sum() == 0 and H[:, :, :6].sum() > 0


@pytest.mark.parametrize("preset", ["small", "published"])
@pytest.mark.parametrize("rows", [[[], []], [[5], [7]], [[5, 5], [5, 6]], [[], [5, 6, 7]]])
def test_short_rows_are_finite(preset, rows):
    model = awake(build(MBHT, preset=preset, max_len=19, **PLAIN))
    p = model(batch_of(rows, L=4))
    assert p.states.isfinite().all() and model.score(batch_of(rows, L=4))[:, 1:].isfinite().all()
    CE()(p).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_hypergraph_has_a_gradient():
    "Similarity weights are learned through: the metric vectors get a gradient."
    model = awake(build(MBHT, max_len=19, **PLAIN))
    torch.manual_seed(0)
    CE()(model(random_batch(40, full=True))).backward()
    assert model.hyper.metric.grad.abs().sum() > 0 and model.hyper.gate.weight.grad.abs().sum() > 0


# ---- pooling and read-out ----

@pytest.mark.parametrize("s, expected", [(4, [[0, 5, 10, 15], [1, 6, 11, 16]]), (10, [[0, 2, 4, 6, 8, 10, 12, 14, 16, 18]])])
def test_pool_neighbours(s, expected):
    "Strided pooling joins slots T/s apart, as the public reshape to (s, T/s) does; windows join s neighbors."
    eye = torch.eye(20)[None]
    every = torch.ones(1, 20, dtype=torch.bool)
    strided, _ = pool(eye, every, 20, s, "strided")
    assert torch.equal(strided, eye.reshape(1, s, 20 // s, 20).mean(1))
    assert [r.nonzero()[:, 0].tolist() for r in strided[0][:len(expected)]] == expected
    window, _ = pool(eye, every, 20, s, "window")
    assert window[0, 0].nonzero()[:, 0].tolist() == list(range(s))


@pytest.mark.parametrize("kind", ["strided", "window"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 19, 20])
def test_pool_counts_from_the_newest(kind, n):
    "A short row pools into the youngest columns of the full one; empty windows are marked and zero."
    g = torch.Generator().manual_seed(n)
    x = torch.randn(1, n, 3, generator=g)
    every = torch.ones(1, n, dtype=torch.bool)
    wide, keep = torch.cat([torch.full((1, 20 - n, 3), 7.), x], 1), torch.arange(20)[None] >= 20 - n
    a, a_real = pool(x, every, 20, 4, kind)
    b, b_real = pool(wide, keep, 20, 4, kind)
    S = a.shape[1]
    assert torch.allclose(a, b[:, -S:], atol=1e-6) and torch.equal(a_real, b_real[:, -S:])
    assert not b_real[:, :-S].any() and b[:, :-S].abs().sum() == 0


@pytest.mark.parametrize("kind", ["published", "clean"])
@pytest.mark.parametrize("window", [(1, 1), (5, 3), (10, 6)])
def test_readout_equals_loop(kind, window):
    item, real, y = cases_with_holes()
    masked = item == MASK
    g = torch.Generator().manual_seed(1)
    holes = masked & ((torch.rand(item.shape, generator=g) < .7) | newest(real))             # some holes have no label
    out = readout(y, real, masked, holes, window, kind)
    for b in range(len(item)):
        n = int(real[b].sum())
        slow = loop_readout(y[b, -n:], masked[b, -n:], holes[b, -n:], window, kind)
        assert (out[b, -n:] - slow).abs().max() < 1e-9


def test_readout_order_free():
    "`clean` reads the same whichever hole is filled first: filling one hole more changes no other. `published` does not."
    item, real, y = cases_with_holes()
    masked = item == MASK
    fewer = masked & newest(real)
    def read(holes, kind): return readout(y, real, masked, holes, (10, 6), kind)[fewer]
    gap = {kind: (read(masked, kind) - read(fewer, kind)).abs().max() for kind in ("clean", "published")}
    assert gap["clean"] < 1e-12 and gap["published"] > 1e-3


# ---- any length ----

@pytest.mark.parametrize("n", [1, 2, 3, 17, 51, 137])
@pytest.mark.parametrize("kinds", KINDS)
def test_bucket_invariance(n, kinds):
    "n+1 slots or all 200: the same scores."
    model = awake(build(MBHT, preset="retail", d_model=16, ff_dim=32, **kinds), std=.1)
    batch = batch_of(random_rows([n, max(1, n // 2)]), L=n)
    wide = widen(batch, 199 - n)
    with torch.no_grad(): a, b = model.score(batch), model.score(wide)
    assert (a - b)[:, 1:].abs().max() < 1e-4 * max(1., float(a[:, 1:].abs().max()))


def both_forms(**changes):
    "One set of weights in either form."
    sizes = dict(preset="published", max_len=39, d_model=16) | PLAIN | changes
    made = {form: awake(build(MBHT, form=form, **sizes)) for form in ("published", "general")}
    made["general"].load_state_dict(made["published"].state_dict())
    return made


@pytest.mark.parametrize("kinds", KINDS)
def test_full_rows_agree(kinds):
    "Without a pad the two forms are one function: same weights, same scores, same states at several holes."
    made = both_forms(**kinds)
    batch = random_batch(40, L=39, full=True)
    a, b = (made[form].score(batch)[:, 1:] for form in made)
    assert (a - b).abs().max() < 1e-5
    states = []
    for form in made:
        torch.manual_seed(1)
        states.append(made[form](batch).states)
    assert (states[0] - states[1]).abs().max() < 1e-5


def test_forms_differ_on_short_rows():
    made = both_forms()
    a, b = (made[form].score(batch_of([[3, 4, 5]]))[:, 1:] for form in made)
    assert (a - b).abs().max() > 1e-3


def test_published_block_equals_public_formulas():
    "Right-padded rows through a block, against the formulas written with reshape, transpose and full-size linear maps along time."
    model = awake(build(MBHT, preset="published", max_len=39, d_model=16, ff_dim=32, **PLAIN), std=.2)
    block, T, d = model.blocks[0], 40, 8
    g = torch.Generator().manual_seed(0)
    x, real = torch.randn(3, T, 16, generator=g), torch.arange(T)[None] < torch.tensor([[40], [7], [1]])
    heads = lambda z: z.reshape(3, -1, 2, d).permute(0, 2, 1, 3)
    def attention(part, x, k, v, q):
        out = ((q @ k.transpose(2, 3)) / math.sqrt(d)).softmax(3) @ v
        return part.norm(part.out(out.permute(0, 2, 1, 3).reshape(3, -1, 16)) + x)
    q, k, v = (heads(z) for z in block.low.qkv(x).chunk(3, 2))
    k, v = k * real[:, None, :, None], v * real[:, None, :, None]
    along = lambda z, i: (z.transpose(2, 3) @ block.low.mix[i].T + block.low.bias[i]).transpose(2, 3)
    branches = [attention(block.low, x, along(k, 0), along(v, 1), q)]
    for s in (4, 20):
        p = x.reshape(3, s, T // s, 16).mean(1)
        q, k, v = (heads(z) for z in block.pooled.qkv(p).chunk(3, 2))
        branches.append(attention(block.pooled, p, k, v, q))
    W = torch.cat([w.flip(0, 1) for w in block.mix.blocks], 1)                                # ages -> slots counted from the oldest
    mixed = (torch.cat(branches, 1).transpose(1, 2) @ W.T + block.mix.bias.flip(0)).transpose(1, 2)
    slow = block.norm(mixed + block.down(torch.nn.functional.gelu(block.up(mixed))))
    assert (block(x, real, torch.ones_like(real)) - slow).abs().max() < 1e-5


def test_unseen_length():
    "Rows longer than any seen, and longer than max_len: the newest max_len events count."
    model = awake(build(MBHT, max_len=19, **PLAIN))
    long = batch_of(random_rows([60, 33]))
    short = replace(long, **{k: getattr(long, k)[:, -19:] for k in ("item_seq", "behavior_seq", "time_seq")})
    assert torch.equal(model.score(long), model.score(short))


def test_batch_company_is_no_matter():
    "A row scores the same alone and beside a much longer one."
    model = awake(build(MBHT, **PLAIN))
    rows = random_rows([3, 45])
    alone, together = model.score(batch_of(rows[:1])), model.score(batch_of(rows))
    assert (alone - together[:1])[:, 1:].abs().max() < 1e-4


def test_right_padded_keeps_order():
    made = cloze(batch_of(random_rows([5, 2, 0])), 5, MASK)
    moved = right_padded(made, 8)
    assert moved.item.shape == (3, 8) and moved.real.sum(1).tolist() == [6, 3, 1]
    assert [r[m].tolist() for r, m in zip(made.item, made.real)] == [r[m].tolist() for r, m in zip(moved.item, moved.real)]
    assert newest(moved.real).nonzero()[:, 1].tolist() == [5, 2, 0] and newest(made.real).nonzero()[:, 1].tolist() == [5, 5, 5]


# ---- behaviors ----

@pytest.mark.parametrize("C", [1, 2, 9])
def test_any_number_of_behaviors(C):
    model = awake(build(MBHT, n_behaviors=C, **PLAIN))
    batch = random_batch(40, n_behaviors=C, full=True)
    assert model.behaviors.shape[0] == C and model.score(batch)[:, 1:].isfinite().all()
    moved = replace(batch, behavior_seq=batch.behavior_seq % C + 1)
    assert (C == 1) == torch.equal(model.score(batch), model.score(moved))


def test_behaviors_in_another_order():
    "Numbered otherwise, with the rows of the table moved along, nothing changes."
    model = awake(build(MBHT, n_behaviors=4, **PLAIN))
    batch = random_batch(40, n_behaviors=4, full=True)
    z = model.score(batch)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad(): model.behaviors.copy_(model.behaviors[order])
    place = torch.empty(5, dtype=torch.int64)
    place[0], place[order + 1] = 0, torch.arange(1, 5)
    assert (model.score(replace(batch, behavior_seq=place[batch.behavior_seq])) - z)[:, 1:].abs().max() < 1e-5


def test_behavior_of_a_hole_is_hidden():
    "Neither the behavior asked for nor that of a hidden event moves a state."
    model = awake(build(MBHT, mask_prob=.5, **PLAIN))
    batch = random_batch(40, full=True)
    torch.manual_seed(3)
    hidden = cloze(batch, 49, 41, .5, 10).masked[:, :-1]
    out = []
    moved = torch.where(hidden, batch.behavior_seq % 3 + 1, batch.behavior_seq)
    for x in (batch, replace(batch, target_behavior=batch.target_behavior % 3 + 1, behavior_seq=moved)):
        torch.manual_seed(3)
        out.append(model(x).states)
    assert torch.equal(*out)


# ---- config ----

@pytest.mark.parametrize("change, word", [(dict(pool="mean"), "pool"), (dict(sim="dot"), "sim"), (dict(readout="x"), "readout"),
                                          (dict(form="any"), "form"), (dict(d_model=33), "n_heads")])
def test_wrong_config_is_named(change, word):
    with pytest.raises(ValueError, match=word): build(MBHT, **change)


@pytest.mark.parametrize("change", [dict(hypergraph=False), dict(repeat_edges=False), dict(pool="strided"), dict(sim="published"),
                                    dict(readout="published"), dict(n_layers=3), dict(scales=(2, 7)), dict(mask_prob=0.),
                                    dict(max_masked=1)])
def test_every_switch_trains(change):
    model = build(MBHT, **change)
    torch.manual_seed(0)
    p = model(random_batch(40))
    CE()(p).backward()
    silent = [n for n, x in model.named_parameters() if x.grad is None]
    assert not silent and p.table.shape[0] == 41 and int(p.targets.max()) <= 40


def test_mask_row_is_no_candidate():
    model = build(MBHT)
    assert model.items.weight.shape[0] == 42 and model.score(random_batch(40)).shape[1] == 41


def test_first_event_can_be_masked():
    model = build(MBHT)
    batch = batch_of([[11, 12, 13]])
    torch.manual_seed(0)
    assert 11 in {int(t) for _ in range(60) for t in model(batch).targets}


def test_memory_is_slots_squared():
    "Nothing that the graph keeps for its gradient grows with B T T D."
    T, D, kept = 120, 64, []
    graph = Hypergraph(MBHT.Config(10, 3))
    for p in graph.parameters(): torch.nn.init.normal_(p)
    item = torch.randint(1, 11, (2, T))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        graph(torch.randn(2, T, D), item, item > 0)
    assert 2 * T * T <= max(kept) <= 2 * T * 2 * T


# ---- the repeat head ----

@pytest.mark.parametrize("preset", ["small", "published"])
def test_repeat_head_points_at_what_is_known(preset):
    "A hole is no candidate of the pointer, and scores are log probabilities in either layout of the slots."
    model = awake(build(MBHT, preset=preset, max_len=19, head="repeat", **PLAIN))
    batch = random_batch(40)
    z = model.score(batch)
    assert torch.allclose(z[:, 1:].exp().sum(1), torch.ones(len(batch)), atol=1e-4)
    slots = model.slots(batch, .5)
    memory = model.memory(batch, slots)
    assert torch.equal(memory.history.known, slots.real & ~slots.masked)
    ages = memory.history.time[memory.history.known]
    assert (ages > 0).all() and model(batch).copy.shape[1] == 2


def test_repeat_head_takes_ce_only():
    with pytest.raises(ValueError, match="head"): build(MBHT, head="other")


# ---- the toy shop ----

@pytest.mark.slow
def test_above_markov_below_the_oracle():
    "On the toy shop of the default size."
    import tempfile
    from mbnb.experiment import configure, run_experiment
    with tempfile.TemporaryDirectory() as runs:
        config = configure(model="mbht", dataset="toyshop", epochs=40, patience=40, lr=1e-2, runs_dir=runs, set=ACCEPT)
        result = run_experiment(config, say=print)
    score = lambda name: result["baselines"][name]["NDCG@10"]
    assert score("markov") < result["test"]["NDCG@10"] < score("oracle")


ACCEPT = "model.d_model=64 model.ff_dim=128 model.dropout=.1 eval.bootstrap=50"
