"""UR4Rec against plain loops, and the mistakes that the public code and its report are known for."""
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mbnb import datasets
from mbnb.checks import awake, build, random_batch, random_items, widen
from mbnb.fit import FitConfig, Stage, fit, make_optimizer, objective, partition, seed_everything, turns
from mbnb.losses.ce import CE
from mbnb.models import ur4rec
from mbnb.models.ur4rec import TERMS, Config, Fusion, Retriever, Source, Taken, UR4Rec, newest, rank_loss, training_items
from mbnb.sequences import batches, next_items

SIZES = dict(n_users=50, text_dim=16, attributes_dim=12, image_dim=10, user_text_dim=16)
QUIET = pytest.mark.filterwarnings("ignore:the context of the user is one token", "ignore:user_context reads texts about users")
FORMS = [{}, {"third": "learned", "user_context": "both"}, {"user_context": "paragraph"}, {"n_sub_experts": 1, "third": "image"},
         {"user_memory": True}]


def staged(model, number, preset="small"):
    "The model under the stage of that number: frozen parts frozen, and told so."
    stage = Stage(**UR4Rec.PRESETS[preset]["stages"][number])
    make_optimizer(model, stage, partition(model, stage))
    model.on_epoch(stage, 0)
    return stage


def loss_of(model, stage, batch): return objective(model.train()(batch), CE(), stage.loss_weights, torch.Generator().manual_seed(0))[0]


# ---- the retriever, pair by pair ----

def slow_gate(gate, vectors):
    x = F.layer_norm(torch.cat(vectors), (sum(len(v) for v in vectors),))
    return gate.second(F.gelu(gate.first(x))).softmax(-1)


def slow_source(u, q, tokens, remembered):
    "Answer (D,) of one source to the question q (D,) from its tokens (n,D); n may be 0."
    D, d = len(q), len(q) // u.heads
    answers = []
    for s in range(u.S):
        mine = slice(s * D, (s + 1) * D)
        if u.many:
            query, key, value = (f(x)[..., mine] for f, x in ((u.query, q), (u.key, tokens), (u.value, tokens)))
            a = u.bias[s, 0, 0]
            for h in range(u.heads * (len(tokens) > 0)):
                part = slice(h * d, (h + 1) * d)
                a = a + (key[:, part] @ query[part] / d ** .5).softmax(0) @ value[:, part] @ u.out[s, part]
        else: a = u.read(tokens.mean(0))[mine]
        if remembered is not None: a = a + remembered[mine]
        x = F.layer_norm(q + a, (D,))
        answers.append(F.gelu(x @ u.up[s] + u.up_bias[s, 0]) @ u.down[s] + u.down_bias[s, 0])
    g = torch.ones(1) if u.gate is None else slow_gate(u.gate, [q, tokens.mean(0) if len(tokens) else q * 0])
    return u.mix(u.norm(sum(x * e for x, e in zip(g, answers))))


def slow_proxies(m, f):
    "LN(f + MHA(f, [f; P], [f; P])) of f (D,), head by head."
    D, d = len(f), len(f) // m.heads
    tokens = torch.cat([f[None], m.proxies])
    (q, _, _), (_, k, v) = m.qkv(f).split(D), m.qkv(tokens).split(D, -1)
    heads = [(k[:, p] @ q[p] / d ** .5).softmax(0) @ v[:, p] for p in (slice(h * d, (h + 1) * d) for h in range(m.heads))]
    return m.norm(f + m.out(torch.cat(heads)))


def slow_pair(model, batch, b, c):
    "Retriever's score of item c for row b of a Batch."
    m, config = model.retriever, model.config
    def described(v):
        third = torch.tensor(v) if config.third == "learned" else getattr(model, config.third)[v]
        return m.text_norm(m.text(model.text[v])), m.third_norm(m.third(third))
    d, v = described(c)
    q = (d + v) / 2
    tokens = [described(i)[0] for i in batch.item_seq[b, -config.n_ctx:].tolist() if i] * (config.user_context != "paragraph")
    if config.user_context != "history":
        tokens.append(m.paragraph_norm(m.paragraph(F.normalize(model.user_text[batch.user[b]], dim=0))))
    kept = m.remember(model.memory[batch.user[b]]) if config.user_memory else None
    tokens = torch.stack(tokens) if tokens else q.new_zeros(0, len(q))
    o = [slow_source(m.user, q, tokens, kept), slow_source(m.desc, q, d[None], None), slow_source(m.other, q, v[None], None)]
    f = sum(w * x for w, x in zip(slow_gate(m.level, [q, *o]), o))
    return F.cosine_similarity(slow_proxies(m, f), q, dim=0) / m.tau


@QUIET
@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("pairs", [1 << 13, 7])
def test_batched_equals_loop(changes, pairs, monkeypatch):
    "All candidates of all users at once, in blocks of any size, are the pairs one after the other."
    monkeypatch.setattr(ur4rec, "PAIRS", pairs)
    model = awake(build(UR4Rec, n_items=12, **changes), .1).double()
    batch = random_batch(12, B=3, L=9)
    item = batch.item_seq.clone(); item[1] = 0                          # a user without a history
    batch = replace(batch, item_seq=item)
    if model.config.user_memory: model.memory.normal_()
    with torch.no_grad():
        z = model.retrieve(batch)[0]
        slow = torch.stack([torch.stack([slow_pair(model, batch, b, c) for c in range(1, 13)]) for b in range(3)])
    assert float((z[:, 1:] - slow).abs().max()) <= 1e-9


@QUIET
@pytest.mark.parametrize("changes", FORMS)
def test_training_scores_what_evaluation_scores(changes):
    "The candidates of a step, drawn at random positions, get the scores that a case ending there gets."
    model, batch = awake(build(UR4Rec, **changes)), random_batch(40, L=6, full=True)
    row, column = torch.tensor([0, 2, 2]), torch.tensor([3, 0, 5])
    ask = torch.tensor([[1, 2, 3], [4, 4, 40], [7, 8, 9]])
    ids = torch.arange(41)
    with torch.no_grad():
        items = model.known(ids)
        z, _ = model.retriever.match(items, model.readers(items, ids, batch, row, column), ask)
        for k in range(3):
            r, n = int(row[k]), int(column[k]) + 1
            columns = {f: getattr(batch, f)[r:r + 1, :n] for f in ("item_seq", "behavior_seq", "time_seq")}
            one = replace(batch, **columns, user=batch.user[r:r + 1], case=batch.case[:1])
            assert float((model.retrieve(one)[0][0, ask[k]] - z[k]).abs().max()) <= 1e-4


def test_each_item_is_mapped_once_a_step(monkeypatch):
    "However many pairs a step has, the texts of its distinct items are mapped, once."
    model, batch = build(UR4Rec).train(), random_batch(40)
    staged(model, 1)
    rows, text = [], model.retriever.text
    monkeypatch.setattr(text, "forward", lambda x: rows.append(len(x)) or F.linear(x, text.weight, text.bias))
    model(batch)
    assert len(rows) == 1 and rows[0] <= 41


# ---- the list of known traps ----

def test_targets_per_epoch():
    "At least half of all training events inside max_len are targets: here all are. The published code has one a user."
    shop = datasets.load("toyshop-tiny")
    inside = sum(int((next_items(b) > 0).sum()) for b in batches(shop, shop.train, 64, 50))
    def targets(positions):
        model = UR4Rec(Config.small(shop.n_items, **SIZES, positions=positions))
        model.on_epoch(Stage(**UR4Rec.PRESETS["small"]["stages"][0]), 0)
        return sum(len(model(b).targets) for b in batches(shop, shop.train, 64, 50))
    assert targets("all") == inside and targets("last") == len(shop.train)
    assert UR4Rec.Config.small(9).positions == "all" and UR4Rec.Config(9).positions == "last"


def test_retriever_is_trained_at_so_many_positions():
    model, batch = build(UR4Rec, n_positions=3).train(), random_batch(40, B=20, L=9)
    staged(model, 1)
    assert len(model(batch).targets) == int(batch.length.clamp(max=3).sum())        # rows of the stage's loss: where the retriever is asked


@pytest.mark.parametrize("preset", UR4Rec.PRESETS)
def test_stage_monitors_own_component(preset):
    "A part that learns alone is judged alone; the sum is judged where both learn."
    monitors = {s["name"]: s["monitor"] for s in UR4Rec.PRESETS[preset]["stages"]}
    want = {"pretrain_sasrec": "sasrec", "pretrain_retriever": "retriever", "joint_finetune": "fused", "end_to_end": "fused"}
    assert monitors == ({"pretrain_sasrec": "sasrec"} if preset == "sequence" else want) and set(monitors.values()) <= set(UR4Rec.parts)


@pytest.mark.parametrize("preset", [p for p in UR4Rec.PRESETS if p != "sequence"])
def test_stages(preset):
    "Who learns when; each stage names all terms, and joint training takes turns."
    stages = [Stage(**s) for s in UR4Rec.PRESETS[preset]["stages"]]
    assert UR4Rec.PRESETS[preset]["loss"] in UR4Rec.losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(UR4Rec, preset=preset, **({} if preset == "small" else {"d_model": 16, "ff_dim": 16, "width": 16, "n_layers": 1}))
    for stage in stages:
        assert set(stage.loss_weights) - {"main"} == set(TERMS)
        partition(model, stage)
    assert [len(turns(s)) for s in stages] == [1, 1, 2, 1]
    trained = [{n.split(".")[0] for n, side in partition(model, s).items() if side >= 0} for s in stages[:2]]
    assert trained == [{"sasrec"}, {"retriever"}]


def test_negatives_exclude_user_items():
    "No negative of a user is an item of their training part; drawn evenly from all others, unseen test items included."
    shop = datasets.load("toyshop-tiny")
    model = UR4Rec(Config.small(shop.n_items, **SIZES | {"n_users": len(shop.users)}))
    model.prepare(shop, None)
    owner, item = training_items(shop)
    own = [set(item[owner == u].tolist()) for u in range(len(shop.users))]
    torch.manual_seed(0)
    for batch in batches(shop, shop.train, 64, 50):
        ask = model.candidates(batch, torch.arange(len(batch)), batch.target)
        assert ask.shape == (len(batch), 1 + model.config.n_neg) and torch.equal(ask[:, 0], batch.target)
        assert not any(set(ask[k, 1:].tolist()) & own[u] or 0 in ask[k] for k, u in enumerate(batch.user.tolist()))
    taken = Taken(model.gaps, model.starts, shop.n_items + 1)
    drawn = torch.bincount(taken.draw(torch.zeros(1, dtype=torch.int64), 200_000)[0], minlength=shop.n_items + 1)
    free = [v for v in range(1, shop.n_items + 1) if v not in own[0]]
    assert (drawn > 0).nonzero()[:, 0].tolist() == free
    assert ((drawn[free] - 200_000 / len(free)).abs() < 6 * (200_000 / len(free)) ** .5).all()


def test_negatives_without_sequences():
    "Nothing is known of the users: their own row is left out. Where nothing is free there is no negative, and no NaN."
    model, batch = build(UR4Rec, n_items=9, n_neg=30).train(), random_batch(9, L=6)
    row = torch.arange(len(batch)).repeat_interleave(2)
    ask = model.candidates(batch, row, batch.target[row])
    assert not any(set(a[1:].tolist()) & {*batch.item_seq[r].tolist(), int(batch.target[r])} for a, r in zip(ask, row.tolist()))
    full = Taken.of(torch.zeros(9, dtype=torch.int64), torch.arange(1, 10), 1, 10)
    assert (full.draw(torch.tensor([0]), 5) == 0).all()
    z, real = torch.randn(2, 4), torch.tensor([[True, False, False, False], [True, True, False, True]])
    assert rank_loss(z, real).isfinite() and rank_loss(z[:1], real[:1]) == 0
    assert rank_loss(z, real, "bce").isfinite() and rank_loss(z[:0], real[:0]) == 0 == rank_loss(z[:0], real[:0], "bce")


@QUIET
@pytest.mark.parametrize("changes", FORMS)
def test_all_experts_receive_gradient(changes):
    "Under the weights of the stage that trains it, every parameter moves; what is frozen does not."
    model, batch = build(UR4Rec, **changes), random_batch(40, B=20, L=12)
    if model.config.user_memory: model.memory.normal_()
    with torch.no_grad(): [p.normal_(std=.1) for p in model.fusion.parameters()]         # its last map begins at zero
    for number in range(4):
        stage = staged(model, number)
        groups = turns(stage)
        asleep = {n for n, side in partition(model, stage).items() if side >= 0}
        for turn in range(len(groups)):
            side = partition(model, stage)
            for n, p in model.named_parameters(): p.requires_grad_(side[n] == turn)
            model.zero_grad()
            loss_of(model, stage, batch).backward()
            moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            assert moved <= {n for n, s in side.items() if s == turn}
            asleep -= moved
        assert not asleep, (stage.name, sorted(asleep))


def test_text_projection_has_gradient():
    "Texts are mapped in the graph at every step, by the retrieval term alone already."
    model, batch = build(UR4Rec).train(), random_batch(40)
    staged(model, 1)
    model(batch).aux["retrieval"].backward()
    assert model.retriever.text.weight.grad.abs().max() > 0 and model.retriever.third.weight.grad.abs().max() > 0
    with torch.no_grad(): before = model.eval().retrieve(batch)[0]
    other = random_items(40, seed=1)
    model.prepare(None, other)
    with torch.no_grad(): assert float((model.retrieve(batch)[0] - before).abs().max()) > .1


@QUIET
@pytest.mark.parametrize("changes", FORMS)
def test_state_dict_roundtrip(changes):
    "Nothing that scores is left out of the weights but the side tables; they come from the data."
    model, fresh, batch = awake(build(UR4Rec, **changes)), build(UR4Rec, seed=1, **changes).eval(), random_batch(40)
    if model.config.user_memory: model.memory.normal_()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(model.score(batch), fresh.score(batch))
    assert not {"text", "attributes", "has_text", "gaps"} & set(model.state_dict())


@pytest.mark.parametrize("name, width", [("text", 17), ("attributes", 3)])
def test_table_of_another_width(name, width):
    "An error that names table, found and expected; no layer that makes it fit."
    model = UR4Rec(Config.small(40, **SIZES | {f"{name}_dim": width}))
    said = f"'{name}': found 41 rows of width {SIZES[name + '_dim']}, expected 41 of {width}"
    with pytest.raises(ValueError, match=said): model.prepare(None, random_items(40))
    with pytest.raises(ValueError, match="found 41 rows"): UR4Rec(Config.small(30, **SIZES)).prepare(None, random_items(40))


def test_without_tables():
    "Before `prepare` all tables are zero; scores are finite, training is. Items without text or genres too."
    model, batch = UR4Rec(Config.small(40, **SIZES)), random_batch(40)
    loss_of(model, staged(model, 1), batch).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(z[:, 1:].isfinite().all() for z in model.eval().score_parts(batch).values())
    assert not build(UR4Rec).has_text.all() and build(UR4Rec).has_text[1:].any()


@QUIET
def test_context_tokens():
    "One token: attention is 1 whatever is asked, so it is said, and queries and keys are not there to be trained."
    for changes in ({"n_ctx": 1}, {"user_context": "paragraph"}):
        with pytest.warns(UserWarning, match="one token"): model = build(UR4Rec, **changes)
        assert not hasattr(model.retriever.user, "query") and not any("key" in n for n, _ in model.retriever.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(UR4Rec).retriever.user.many
    source = Source(8, 3, 2, many=True)
    token, real = torch.randn(1, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad(): a = source.attend(torch.randn(1, 6, 24), source.key(token), source.value(token), real)
    assert float((a - a[:, :, :1]).abs().max()) < 1e-6                   # as it would be with them


@QUIET
def test_paragraph_warns():
    for changes in ({"user_context": "paragraph"}, {"user_context": "both"}):
        with pytest.warns(UserWarning, match="which events they were written from"): build(UR4Rec, **changes)


@pytest.mark.parametrize("kind", ["weighted", "learned", "adaptive"])
def test_fusion_scale_free(kind):
    "The sequence model ten times as loud: the same ranking. Added as they come, another one."
    torch.manual_seed(0)
    h, x, s, r = torch.randn(5, 64), torch.randn(5, 64), torch.randn(5, 30), torch.randn(5, 30)
    real = torch.rand(5, 30) < .9
    def order(times, norm):
        torch.manual_seed(1)
        fusion = Fusion(Config.small(9, fusion=kind, fusion_norm=norm))
        with torch.no_grad(): return fusion(h, x, s * times, r, real).masked_fill(~real, -torch.inf).argsort(1)
    assert torch.equal(order(1, "zscore"), order(10, "zscore")) and not torch.equal(order(1, "none"), order(10, "none"))
    fusion = Fusion(Config.small(9, fusion=kind, fusion_weight=.3))
    assert float(fusion(h, x, s, r * 0, real).detach().std()) == pytest.approx(.3, rel=.1)       # a constant score adds nothing


def test_fused_is_the_sum_of_the_parts():
    model, batch = awake(build(UR4Rec, fusion="weighted", fusion_weight=.4)), random_batch(40)
    with torch.no_grad(): parts = model.score_parts(batch)
    z = {k: (v[:, 1:] - v[:, 1:].mean(1, keepdim=True)) / v[:, 1:].std(1, keepdim=True, correction=0) for k, v in parts.items()}
    assert float((.4 * z["sasrec"] + .6 * z["retriever"] - parts["fused"][:, 1:]).abs().max()) < 1e-4
    assert tuple(parts) == UR4Rec.parts and all((v[:, 0] == -torch.inf).all() and v.dtype == torch.float32 for v in parts.values())
    with torch.no_grad():
        assert torch.equal(model.score(batch), parts["fused"])
        assert torch.equal(model.score_parts(batch, ("sasrec",))["sasrec"], parts["sasrec"])


def test_user_context_is_prefix_only():
    "What the retriever knows of the user at a position is what came before: later items change no training score there, earlier ones do."
    model, batch = awake(build(UR4Rec)), random_batch(40, L=8, full=True)
    row, column, ask, ids = torch.arange(6), torch.full((6,), 4), torch.randint(1, 41, (6, 5)), torch.arange(41)
    def scores(changed):
        item = batch.item_seq.clone()
        item[:, changed] = item[:, changed] % 40 + 1
        with torch.no_grad():
            items = model.known(ids)
            return model.retriever.match(items, model.readers(items, ids, replace(batch, item_seq=item), row, column), ask)[0]
    base = scores([])
    assert torch.equal(base, scores([5, 6, 7])) and (base - scores([4])).abs().max() > 1e-3 and (base - scores([0])).abs().max() > 1e-4
    read = newest(batch.item_seq, row, column, 20)
    assert read[:, -5:].equal(batch.item_seq[:, :5]) and not read[:, :15].any()


@QUIET
@pytest.mark.parametrize("changes", FORMS)
def test_eval_is_deterministic(changes):
    "Scoring draws nothing and remembers nothing; training moves the memory, within the events it waits for."
    model, batch = awake(build(UR4Rec, **changes)), random_batch(40)
    with torch.no_grad():
        a = model.score(batch)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.recommend(batch, 5); model(batch)
        assert torch.equal(a, model.score(batch))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_memory():
    "First the context, then a running mean, and only after so many events or so much drift."
    model = build(UR4Rec, user_memory=True, memory_decay=.9, memory_events=5, memory_drift=.5)
    D, user = model.config.width, torch.tensor([3, 3, 7])
    x = F.normalize(torch.randn(1, D), dim=-1)
    model.remember(user, x.expand(3, D))
    assert torch.allclose(model.memory[3], x[0]) and torch.allclose(model.memory[7], x[0]) and not model.memory[4].any()
    near = F.normalize(x + .01 * torch.randn(1, D), dim=-1)
    model.remember(user[:2], near.expand(2, D))
    assert torch.equal(model.memory[3], model.memory[7]) and model.events[3] == 2
    model.remember(torch.tensor([3, 3, 3]), near.expand(3, D))                                  # five events
    assert torch.allclose(model.memory[3], .9 * x[0] + .1 * near[0], atol=1e-6) and model.events[3] == 0
    model.remember(user[2:], -x)                                                                # a turn
    assert torch.allclose(model.memory[7], .8 * x[0], atol=1e-6)
    batch = random_batch(40)
    model.train()(batch)
    assert model.memory[batch.user].any(1).all()


def test_resting_retriever_is_asked_once(monkeypatch):
    "In the first stage the retriever stands still: the same cases, the same scores, computed once; a step of its own and they are new."
    model, batch, asked = awake(build(UR4Rec)), random_batch(40), []
    staged(model, 0)
    plain = UR4Rec.retrieve
    monkeypatch.setattr(UR4Rec, "retrieve", lambda self, b: asked.append(1) or plain(self, b))
    with torch.no_grad():
        a = model.score_parts(batch)
        model.sasrec.items.weight[1:] += 1
        b = model.score_parts(batch)
        assert len(asked) == 1 and torch.equal(a["retriever"], b["retriever"]) and not torch.equal(a["fused"], b["fused"])
        model.score_parts(widen(batch, 1)); assert len(asked) == 2
        model.retriever.text.weight += .1
        assert not torch.equal(model.score_parts(batch)["retriever"], a["retriever"]) and len(asked) == 3
        staged(model, 1)
        model.score_parts(batch); model.score_parts(batch)
    assert len(asked) == 5 and model.kept is None


# ---- losses ----

@pytest.mark.parametrize("kind, level", [("infonce", None), ("bce", None)])
def test_retrieval_at_init(kind, level):
    "InfoNCE begins near ln(1+N) plus half the variance of the logits."
    model, batch = build(UR4Rec, n_items=400, retrieval=kind), random_batch(400, B=40, L=20)
    staged(model, 1)
    with torch.no_grad(): value, z = float(model.train()(batch).aux["retrieval"]), model.eval().retrieve(batch)[0][:, 1:]
    if kind == "infonce": assert value == pytest.approx(math.log(1 + model.config.n_neg) + float(z.var()) / 2, rel=.25)
    else: assert math.log(2) / 2 < value < 3


def test_terms_that_are_not_weighed_are_not_computed(monkeypatch):
    model, batch = build(UR4Rec).train(), random_batch(40)
    staged(model, 0)
    monkeypatch.setattr(UR4Rec, "terms", lambda *a: pytest.fail("the retriever works in the first stage"))
    p = model(batch)
    assert set(p.aux) == set(TERMS) and not any(v.any() for v in p.aux.values())
    monkeypatch.undo()
    staged(model, 2)
    assert {k for k, v in model(batch).aux.items() if v.any()} == {"retrieval", "fused"}


def test_watch_values():
    model, batch = build(UR4Rec).train(), random_batch(40)
    assert model.watch_values() == {} and not model.expert_load().any()
    staged(model, 1)
    model(batch); model(batch)
    told = model.watch_values()
    assert sum(v for k, v in told.items() if k.startswith("source")) == pytest.approx(1, abs=1e-5)
    for m in ("user", "text", "third"):
        assert sum(v for k, v in told.items() if k.startswith(f"{m} expert")) == pytest.approx(1, abs=1e-5)
    assert model.expert_load().shape == (9,) and float(model.expert_load().sum()) == pytest.approx(1, abs=1e-5)
    model.on_epoch(Stage(**UR4Rec.PRESETS["small"]["stages"][1]), 1)
    assert model.watch_values() == {}


def test_wrong_values():
    wrong = [({"fusion": "gating"}, "fusion='gating': expected 'weighted', 'learned' or 'adaptive'"),
             ({"n_ctx": 0}, "n_ctx=0"), ({"tau": 0.}, "tau=0"),
             ({"moe_heads": 5}, "not a multiple"), ({"fusion_weight": 1.}, "fusion_weight=1.0"), ({"text_dim": 0}, "data.text=FILE"),
             ({"third": "image", "image_dim": 0}, "third='learned' needs none"),
             ({"user_context": "both", "user_text_dim": 0}, "take 'history'"), ({"user_memory": True, "n_users": 0}, "n_users")]
    for changes, says in wrong:
        with pytest.raises(ValueError, match=says): UR4Rec(Config.small(40, **SIZES | changes))


@pytest.mark.parametrize("number", range(4))
def test_runs_in_half_precision(number):
    model, batch = build(UR4Rec), random_batch(40)
    stage = staged(model, number)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, stage, batch).backward()
        with torch.no_grad(): assert model.eval().score(batch).dtype == torch.float32


# ---- a short training ----

@pytest.fixture(scope="module")
def story():
    "Records of two epochs a stage on the tiny shop, with the weights after each, and the model."
    shop, found = datasets.load("toyshop-tiny"), []
    items = datasets.load_items("toyshop-tiny", shop, UR4Rec.sides)
    seed_everything(0)
    sizes = dict(n_users=len(shop.users), **items.widths())
    model = UR4Rec(Config.small(shop.n_items, **sizes, n_positions=1, n_neg=5, d_model=16, ff_dim=16, width=16))
    model.prepare(shop, items)
    few = next(iter(batches(shop, shop.valid, 100, 50)))
    def evaluate(model, part=None):
        z = model.score_parts(few)[part]
        value = float(-(z.gather(1, few.target[:, None]) < z).sum(1).float().mean())
        return {"value": value, "error": .1, "metrics": {}, "weights": {k: v.clone() for k, v in model.state_dict().items()}}
    stages = [Stage(**s | {"epochs": 2, "warmup": 3}) for s in UR4Rec.PRESETS["small"]["stages"]]
    found = list(fit(model, {None: CE()}, shop, stages, FitConfig(threads=1), evaluate))
    return stages, found, model


def test_lr_restarts_per_stage(story):
    "Each stage warms up and cools down by its own steps; a part that was frozen begins at the start of its curve."
    stages, records, _ = story
    for stage in stages:
        rates = [r["lr"] for r in records if r["kind"] == "step" and r["stage"] == stage.name]
        top = stage.lr if isinstance(stage.lr, float) else stage.lr["sasrec"]         # of the first group, which the record shows
        assert rates[0] == pytest.approx(top / 3) and max(rates) == pytest.approx(top, rel=.2) and rates[-1] < .2 * top


def test_best_of_all_stages_is_kept(story):
    "A later stage starts from the best weights of the one before, and its start is a candidate: nothing worse is kept."
    stages, records, model = story
    epochs = [r for r in records if r["kind"] == "epoch"]
    best = {}
    for r in epochs:
        if r["best"]: best[r["stage"]] = r
    for a, b in zip(stages, stages[1:]):
        start = next(r for r in epochs if r["stage"] == b.name)
        assert start["epoch"] == -1 and all(torch.equal(v, start["weights"][k]) for k, v in best[a.name]["weights"].items())
    assert best["end_to_end"]["value"] >= best["joint_finetune"]["value"]
    assert all(torch.equal(v, best["end_to_end"]["weights"][k]) for k, v in model.state_dict().items())


def test_what_is_frozen_stands_still(story):
    stages, records, _ = story
    for stage in stages[:2]:
        seen = [r["weights"] for r in records if r["kind"] == "epoch" and r["stage"] == stage.name]
        for name in stage.freeze: assert all(torch.equal(v, seen[-1][k]) for k, v in seen[0].items() if k.startswith(name))
        assert any(not torch.equal(v, seen[-1][k]) for k, v in seen[0].items() if k.startswith(stage.train[0]))


def test_retriever_class_is_small():
    "Parameters of `small`, near the card's 0.6 M."
    model = UR4Rec(Config.small(1682, n_users=943, text_dim=256, attributes_dim=19))
    assert 4e5 < sum(p.numel() for p in model.parameters()) < 7e5 and isinstance(model.retriever, Retriever)
