"""GRAM and GRAM-C: vocabularies and prompts, late fusion and what is shared in it, answers, the prefix and its mask, and the errors."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mbnb import datasets
from mbnb.checks import awake, build, check_model, choices, random_batch, random_items, widen
from mbnb.config import make_config
from mbnb.events import DataError
from mbnb.experiment import build_items, configure
from mbnb.fit import Stage, partition
from mbnb.ids import IdTable, piece_table
from mbnb.items import Items, Table
from mbnb.losses.ce import CE
from mbnb.models.gram import GRAM
from mbnb.models.gram_c import GRAMC
from mbnb.prompts import PromptError, in_trie, item_prompts, next_to, own_vocabulary, t5_vocabulary, token_losses
from mbnb.search import make_trie
from mbnb.seq2seq import CheckpointError

SMALL = dict(d_model=32, ff_dim=64, d_head=8)
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁nail", "▁red", "▁pol", "ish", "▁lamp", ",", ":"]


def tokenizer_file(folder):
    "A made-up tokenizer of a few pieces, saved as tokenizer.json."
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(p, -1.0 - k / 100) for k, p in enumerate(PIECES)], unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def words_of_six():
    "Items of six things with texts and ids of words."
    texts = ["red nail polish", "red lamp polish", "nail file", "blue lamp", "blue lamp", "lamp"]
    spelled = [("nail", "polish"), ("lamp", "polish"), ("nail", "file"), ("lamp", "blue"), ("lamp", "#1"), ("lamp", "red")]
    names = ["", *(f"i{v}" for v in range(1, 7))]
    table = Table("text", names[1:], texts, "made up")
    return Items(names, [], {"text": table}, "tfidf", ids=lambda _: piece_table(spelled, "made up", names))


def gram_of(items, **changes):
    torch.manual_seed(0)
    table = items["ids"]
    model = GRAM(GRAM.Config.small(len(items.items) - 1, n_tokens=table.n_tokens, id_length=table.length, **SMALL | changes))
    model.prepare(None, items)
    return model.eval()


def save_t5(folder, rows=40, **changes):
    "The folder of a small T5 with random weights, as transformers saves it."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = dict(vocab_size=rows, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0) | changes
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    model.save_pretrained(folder)
    return model


# ---- vocabularies ----

def test_own_vocabulary_is_one_to_one():
    "Each piece of an id has a row of its own; words of texts that are pieces share it, marks and other words do not."
    items = words_of_six()
    v = own_vocabulary(items["ids"].words, items.texts())
    assert len(set(v.pieces.tolist())) == items["ids"].n_tokens
    assert v.spell("nail") == [items["ids"].words.index("nail")]
    assert not {r for rows in v.marks.values() for r in rows} & set(v.pieces.tolist())
    assert v.spell("unheard of") == []


def test_codes_are_no_words():
    "A text that holds the name of a code does not get the token of the code."
    v = own_vocabulary(("", "a1", "b12"), ["vitamin b12", "b12"])
    assert v.spell("b12")[0] not in v.pieces


def test_t5_vocabulary_by_table(tmp_path):
    "Pieces of the tokenizer keep their rows, all others get new ones; no id is ever tokenized again."
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(tokenizer_file(tmp_path))
    words = ("", "nail", "polish", "red", "#1")
    v = t5_vocabulary(words, tokenizer)
    assert v.pieces.tolist() == [0, 4, 11, 5, 12] and v.n == 13
    assert v.start[11] == [6, 7]
    cut = t5_vocabulary(("", "▁nail", "nail", "ish"), tokenizer)    # "nail" without ▁ is another piece, and not one of this tokenizer
    assert cut.pieces.tolist() == [0, 4, 11, 7]
    with pytest.raises(PromptError, match="11 pieces, the checkpoint's token table 5 rows"):
        t5_vocabulary(words, tokenizer, 5)


def test_prompts_are_cut_and_filled():
    v = own_vocabulary(("", "x", "y"), ["", "long text text long", "text"])
    ids = np.array([[0, 0], [1, 0], [1, 2]])
    lines = item_prompts(v, ids, [[0], [2], [0]], ["", "long text", ""], 6)
    assert lines[0].tolist() == [0] * 6
    assert lines[1].tolist() == [1, *v.marks["similar"], 1, 2, *v.marks["text"], *v.spell("long")]
    assert lines[2].tolist() == [1, 2, 0, 0, 0, 0]


# ---- similar items ----

def test_neighbors_come_from_training_alone():
    "Changing what validation and test ask for, and what comes after the training part, changes no neighbor."
    s = datasets.load("toyshop-tiny")
    found = next_to(s, 3)
    held = np.ones(len(s.item), bool)
    for a, n in zip(s.train.start, s.train.length, strict=True): held[a:a + n + 1] = False      # the target stands right behind the history
    item = s.item.copy()
    item[held] = 1
    test, valid = (replace(c, target=np.ones_like(c.target)) for c in (s.test, s.valid))
    other = replace(s, item=item, test=test, valid=valid)
    assert (next_to(other, 3) == found).all()
    assert (found[1:, 0] > 0).all() and (found[0] == 0).all()
    assert not (found == np.arange(len(found))[:, None])[1:].any()


def test_neighbors_by_hand():
    train = SimpleNamespace(start=np.array([0, 4]), length=np.array([2, 1]), target=np.array([3, 3]))
    few = SimpleNamespace(items=np.arange(5), item=np.array([1, 2, 2, 3, 1, 2]), train=train)
    assert next_to(few, 2).tolist() == [[0, 0], [2, 3], [1, 3], [1, 2], [0, 0]]


# ---- reading ----

@pytest.mark.parametrize("cls", [GRAM, GRAMC])
def test_width_and_chunk_change_nothing(cls):
    batch = random_batch(40)
    whole, apart = awake(build(cls, **SMALL)), awake(build(cls, chunk=2, **SMALL))
    a, b = whole(batch), apart(widen(batch, 4))
    assert torch.equal(a.targets, b.targets) and torch.allclose(a.states, b.states, atol=1e-4)
    assert torch.allclose(whole.score(batch)[:, 1:], apart.score(widen(batch, 4))[:, 1:], atol=1e-4)


def test_an_item_is_read_once():
    "The encoder sees each distinct item of a batch once, however many histories hold it."
    model, batch, seen = awake(build(GRAM, **SMALL)), random_batch(40), []
    read = model.writer.encoder.forward
    model.writer.encoder.forward = lambda x, real: seen.append(len(x)) or read(x, real)
    p = model(batch)
    assert seen[0] <= 1 + len(batch.item_seq[batch.item_seq > 0].unique()) < (batch.item_seq > 0).sum()
    assert sum(seen[1:]) == int((batch.item_seq > 0).sum()) == len(p.targets) // 3          # the coarse prompts, one an example


def test_every_prefix_is_an_example():
    "A row of n events gives n ids to write, whatever the window."
    batch = random_batch(40, full=True)
    model = awake(build(GRAM, max_len=3, among="tokens", **SMALL))
    assert len(model(batch).targets) == 3 * batch.item_seq.numel()


def test_prediction_table_holds_the_tokens_of_ids():
    model = gram_of(words_of_six())
    p = model(random_batch(6))
    assert len(p.table) == model.config.n_tokens < len(model.writer.tokens.weight)
    assert float(CE()(p, None).detach()) == pytest.approx(np.log(choices(model, p)), rel=.15)


def test_gradients_reach_all():
    for cls in (GRAM, GRAMC):
        model = build(cls, **SMALL)
        CE()(model(random_batch(40)), None).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_bf16_on_a_cpu():
    "Half of the digits, the same answers: the path of a GPU, and scores stay float32."
    batch = random_batch(40)
    for cls in (GRAM, GRAMC):
        model = awake(build(cls, **SMALL), std=.1)
        with torch.autocast("cpu", torch.bfloat16):
            p = model(batch)
            loss = CE()(p, None)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(CE()(model(batch), None).detach()), rel=.02)
        assert model.score(batch).dtype == torch.float32


def test_two_prepares_keep_the_weights():
    items = random_items(40)
    model = build(GRAM, **SMALL)
    before = model.writer.tokens.weight.detach().clone()
    model.prepare(None, items)
    assert torch.equal(model.writer.tokens.weight, before)


# ---- answers ----

@pytest.mark.parametrize("cls", [GRAM, GRAMC])
def test_beam_all_valid(cls):
    "k distinct items, best first, from a beam that is widened as far as needed; where the catalogue ends, 0 with -inf."
    model, batch = awake(build(cls, n_items=120, beam=10, **SMALL)), random_batch(120)
    ids, value = model.recommend(replace(batch, exclude=torch.tensor([[1, 2, 3]]).repeat(6, 1)), 70)
    assert (ids > 3).all() and all(len(set(row)) == 70 for row in ids.tolist())
    assert (value.diff(dim=1) <= 0).all()
    ids, value = model.recommend(batch, 130)
    assert (ids[:, :120] > 0).all() and (ids[:, 120:] == 0).all() and (value[:, 120:] == -torch.inf).all()
    assert int(model.score(batch).isfinite().sum()) == 10 * len(batch)


def test_no_ids_no_answer():
    model = GRAM(GRAM.Config.small(5))
    with pytest.raises(ValueError, match="call prepare"): model(random_batch(5))
    with pytest.raises(ValueError, match="call prepare"): model.score(random_batch(5))


# ---- knowledge of the trie ----

def test_entropy_in_the_trie_by_hand():
    ids = piece_table([("nail", "polish", "red"), ("nail", "polish", "#1"), ("lamp", "red")], "made up").tokens
    share = in_trie(torch.tensor([0.0, 3, 3, 2, 1, 1]), torch.from_numpy(ids[1:]), make_trie(ids)).exp()
    assert torch.allclose(share, torch.tensor([[4 / 3, 1, 3 / 2], [4 / 3, 1, 3], [4, 1, 1]]))


def test_token_losses_are_those_of_the_loss():
    model, batch = awake(build(GRAM, among="tokens", **SMALL)), random_batch(40)
    whole, inside = token_losses(model.writer, batch)
    last = replace(batch, extra={"label_mask": torch.zeros_like(batch.item_seq).index_fill_(1, torch.tensor([6]), 1)})
    assert float(whole.mean()) == pytest.approx(float(CE()(model(last), None).detach()), rel=1e-4)
    assert (inside <= whole + 1e-5).all() and (inside >= -1e-5).all()


# ---- a checkpoint ----

def test_checkpoint_and_tokenizer(tmp_path):
    "Weights and pieces of a T5 folder; encoder states as transformers computes them, new rows at the mean of their pieces."
    theirs = save_t5(tmp_path)
    tokenizer_file(tmp_path)
    model = gram_of(words_of_six(), checkpoint=str(tmp_path))
    w = model.writer
    assert w.vocabulary.n == len(w.tokens.weight) == 40 + len(w.vocabulary.start)
    row, pieces = next((r, p) for r, p in w.vocabulary.start.items() if len(p) > 1)
    assert torch.allclose(w.tokens.weight[row], w.tokens.weight[pieces].mean(0))
    rows = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        wanted = theirs.encoder(input_ids=rows).last_hidden_state
        assert torch.allclose(w.encode(rows)[0], wanted, atol=1e-5)
    ids, _ = model.recommend(random_batch(6), 6)
    assert all(sorted(row) == [1, 2, 3, 4, 5, 6] for row in ids.tolist())


def test_checkpoint_is_read_once(tmp_path):
    "A second `prepare`, after training, does not bring the checkpoint's weights back."
    save_t5(tmp_path); tokenizer_file(tmp_path)
    model = gram_of(items := words_of_six(), checkpoint=str(tmp_path))
    with torch.no_grad(): model.writer.tokens.weight += 1
    moved = model.writer.tokens.weight.detach().clone()
    model.prepare(None, items)
    assert torch.equal(model.writer.tokens.weight, moved)


# ---- errors ----

def test_missing_tokenizer(tmp_path):
    with pytest.raises(PromptError, match="needs a tokenizer.*model.tokenizer=FILE"): gram_of(words_of_six(), vocabulary="t5")
    with pytest.raises(PromptError, match="no such tokenizer"): gram_of(words_of_six(), vocabulary="t5", tokenizer="/nowhere")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(PromptError, match="not a tokenizer"):
        gram_of(words_of_six(), vocabulary="t5", tokenizer=str(tmp_path / "tokenizer.json"))
    save_t5(tmp_path / "t5")
    with pytest.raises(PromptError, match="no such tokenizer"): gram_of(words_of_six(), checkpoint=str(tmp_path / "t5"))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"): gram_of(words_of_six(), checkpoint="/nowhere")
    save_t5(tmp_path, d_model=16)
    with pytest.raises(CheckpointError, match="set model.d_model=16 model.ff_dim=64"): gram_of(words_of_six(), checkpoint=str(tmp_path))


def test_item_without_id():
    with pytest.raises(DataError, match="item 'b' has no id"): IdTable(np.array([[0], [1], [0]]), ("", "x"), "made up", ("", "a", "b"))


@pytest.mark.parametrize("cls", [GRAM, GRAMC])
def test_ids_of_another_catalogue(cls):
    with pytest.raises(ValueError, match="ids of another catalogue"): build(cls, **SMALL).prepare(None, random_items(30))


def test_unknown_settings():
    for cls, change, says in ((GRAM, {"vocabulary": "t6"}, "expected 't5' or 'own'"),
                              (GRAM, {"among": "tree"}, "expected 'tokens' or 'trie'"),
                              (GRAMC, {"mode": "pol"}, "expected 'pool' or 'sequential'")):
        with pytest.raises(ValueError, match=says): build(cls, **SMALL | change)


def test_graph_of_other_items():
    "Keys that fit no item are refused with what would mend them, and a table of another width by its shape."
    items, model = random_items(40), build(GRAMC, **SMALL)
    def given(keys, D):
        return Items(items.items, [], {"graph": Table("graph", keys, np.ones((40, D), np.float32), "made up")}, ids=items.ids)
    with pytest.raises(DataError, match="0 of 40 items found; 40 match if keys end at the first blank"):
        model.prepare(None, given([f"{k} title: a thing" for k in items.items[1:]], 8))
    with pytest.raises(ValueError, match=r"shape \(41, 9\), expected \(41, 8\)"): model.prepare(None, given(items.items[1:], 9))


def test_graph_is_needed():
    s = datasets.load("toyshop-tiny")
    with pytest.raises(DataError, match="data.graph=RUN FOLDER"): datasets.load_items("toyshop-tiny", s, GRAMC.sides)


# ---- the prefix ----

@pytest.mark.parametrize("mode", ["pool", "sequential"])
def test_prefix_moves_the_scores(mode):
    "Prefixes that users swap change the scores; a table of zeros that may be read makes one prefix for all, and swapping does nothing."
    batch = random_batch(40, full=True)
    def effect(m):
        swapped = m.writer.score(batch, prefix=lambda x: tuple(t.flip(0) for t in m.prefix(x)))
        return float((m.score(batch) - swapped)[:, 1:].detach().abs().max())
    assert effect(awake(build(GRAMC, mode=mode, **SMALL))) > 1e-3
    dead = awake(build(GRAMC, mode=mode, **SMALL))
    dead.graph.zero_(); dead.has_graph.fill_(True)
    assert effect(dead) < 1e-5


@pytest.mark.parametrize("mode", ["pool", "sequential"])
def test_prefix_mask(mode):
    "What stands under the mask changes nothing; all of it masked, the model is GRAM."
    batch = random_batch(40)
    model = awake(build(GRAMC, mode=mode, **SMALL))
    loud = lambda x: (lambda g, real: (g.masked_fill(~real[..., None], 9.0), real))(*model.prefix(x))
    assert torch.allclose(model.score(batch)[:, 1:], model.writer.score(batch, prefix=loud)[:, 1:], atol=1e-4)
    model.has_graph.zero_()
    assert torch.allclose(model.score(batch)[:, 1:], model.writer.score(batch)[:, 1:], atol=1e-4)


def test_prefix_dropout():
    "One training example in five loses its prefix, whole, and masked; none in evaluation."
    model = build(GRAMC, mode="sequential", **SMALL).train()
    item = int(model.has_graph.nonzero()[0])
    torch.manual_seed(0)
    g, real = model.prefix(torch.full((4000, 5), item))
    assert (real.all(1) | ~real.any(1)).all() and float((~real.any(1)).float().mean()) == pytest.approx(.2, abs=.03)
    assert (g[~real] == 0).all() and (g[real] != 0).any(-1).all()
    assert model.eval().prefix(torch.full((40, 5), item))[1].all()


def test_newest_first():
    model = awake(build(GRAMC, mode="sequential", n_recent=2, **SMALL))
    items = model.has_graph.nonzero()[:3, 0]
    g, real = model.prefix(items[None])
    assert real.all() and torch.allclose(g[0], model.adapter(model.graph[items[[2, 1]]]), atol=1e-5)


def test_prefix_reaches_further_than_the_prompts():
    "With prompts on two items the prefix still reads five; what lies further back is read by nobody."
    model, batch = awake(build(GRAMC, max_len=2, prompt_len=5, **SMALL)), random_batch(40, L=8, full=True)
    def moved(at):
        item = batch.item_seq.clone()
        item[:, at] = item[:, at] % 40 + 1
        return float((model.score(batch) - model.score(replace(batch, item_seq=item)))[:, 1:].detach().abs().max())
    assert moved(-5) > 1e-4 and moved(-6) == 0


def test_graph_is_frozen():
    "The table is no parameter: no optimizer sees it, no checkpoint holds it."
    model = build(GRAMC, **SMALL)
    assert not any("graph" in k for k in model.state_dict())
    for preset in GRAMC.PRESETS.values():
        assert set(partition(model, Stage(**preset["stages"][0])).values()) == {0}
        assert preset["stages"][0]["lr"]["adapter"] == 10 * preset["stages"][0]["lr"]["*"]


@pytest.mark.parametrize("name", ["gram", "gram_c"])
def test_presets(name):
    for preset, sizes in (("published", (512, 2048, 8, 64, 6, 20, 128, 10)), ("small", (128, 512, 4, 32, 2, 10, 48, 2))):
        made = make_config(model=name, preset=preset, dataset="toyshop-tiny")
        config = {"gram": GRAM, "gram_c": GRAMC}[name].Config
        c = config.small(5) if preset == "small" else config(5, 2, 1, **({"graph_dim": 1} if name == "gram_c" else {}))
        assert (c.d_model, c.ff_dim, c.n_heads, c.d_head, c.n_layers, c.max_len, c.prompt_len, c.num_cf) == sizes
        assert (c.dropout, c.beam, c.penalty) == (.1, 50, 1.0) and made.stages[0].schedule == "linear" and made.fit.clip == 1


@pytest.mark.slow
def test_conformance_at_twice_the_width_of_the_page():
    "The page checks a width of 32 for its time; 64 has to pass as well."
    check_model(GRAM, CE(), d_model=64, ff_dim=128, d_head=16)


def test_graph_by_the_id_of_a_run(tmp_path):
    s = datasets.load("toyshop-tiny")
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine" / "item_vectors.npz", item=s.items[1:].astype(str), vector=np.ones((s.n_items, 8), np.float32))
    given = dict(model="gram_c", dataset="toyshop-tiny", runs_dir=str(tmp_path))
    asked = lambda graph: build_items(configure(**given, set=f"data.graph={graph}"), s)
    assert asked("mine").sources()["graph"] == asked(tmp_path / "mine").sources()["graph"]
    with pytest.raises(DataError, match="other: no such file; expected the table 'graph' there"): asked("other")
