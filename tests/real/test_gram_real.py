"""GRAM on Beauty: 12,101 items spelled piece by piece in rows of a token table, with the shipped ids and tokenizer and with our own."""
import numpy as np
import pytest
import torch

from mbnb.checks import choices
from mbnb.datasets import load, load_items
from mbnb.experiment import configure, prepare
from mbnb.fit import seed_everything
from mbnb.losses.ce import CE
from mbnb.models.gram import GRAM
from mbnb.prompts import PromptError, in_trie, next_to, token_losses
from mbnb.search import make_trie
from mbnb.sequences import collate

pytestmark = pytest.mark.real_data
SHIPPED = "item_generative_indexing_hierarchy_v1_c128_l7_len32768_split.txt"


@pytest.fixture(scope="module")
def beauty(shared_data):
    return load("beauty", users=200)


def made(beauty, ids="lexical", **changes):
    "A narrow GRAM on Beauty's catalogue."
    items = load_items("beauty", beauty, GRAM.sides, ids=ids, encoder="tfidf")
    seed_everything(0)
    sizes = dict(d_model=32, ff_dim=64, d_head=8, n_layers=1, n_tokens=items["ids"].n_tokens, id_length=items["ids"].length)
    model = GRAM(GRAM.Config.small(beauty.n_items, **sizes | changes)).eval()
    model.prepare(beauty, items)
    return model, items


@pytest.fixture(scope="module")
def shipped(beauty, shared_data):
    tokenizer = str(shared_data / "t5_tokenizer" / "tokenizer.json")
    return made(beauty, ids=str(shared_data / "beauty" / SHIPPED), vocabulary="t5", tokenizer=tokenizer)


def test_shipped_ids_are_pieces_of_the_shipped_tokenizer(shipped):
    "All 12,101 ids, from items to rows of the token table and back, by tables alone; no two items are spelled alike."
    model, items = shipped
    w, table = model.writer, items["ids"]
    assert len(w.vocabulary.start) == 0 and len(set(w.pieces.tolist())) == table.n_tokens
    spelled = w.pieces[w.ids].numpy()
    assert len(np.unique(spelled[1:], axis=0)) == 12_101
    back = {row: t for t, row in enumerate(w.pieces.tolist())}
    assert all(table.lookup[tuple(back[r] for r in row if r)] == v for v, row in enumerate(spelled.tolist()) if v)


def test_fine_prompts_hold_id_neighbors_and_text(shipped):
    model, items = shipped
    w, near = model.writer, items["similar"].values
    for v in (1, 500, 12_101):
        line = [int(r) for r in w.prompts[v] if r]
        own, other = ([int(w.pieces[t]) for t in w.ids[k] if t] for k in (v, near[v, 0]))
        assert line[:len(own)] == own
        assert line[len(own) + len(w.vocabulary.marks["similar"]):][:len(other)] == other
        assert line[-3:] == w.vocabulary.spell(items.texts()[v])[-3:] or len(line) == model.config.prompt_len


def test_every_user_gets_distinct_items(beauty, shipped):
    "50 distinct items of the catalogue for each of 200 users."
    model, _ = shipped
    ids, scores = model.recommend(collate(beauty, beauty.test, np.arange(200), model.config.max_len), 50)
    assert ids.shape == (200, 50) and (ids > 0).all() and all(len(set(row)) == 50 for row in ids.tolist())
    assert scores.isfinite().all()


def test_own_ids_start_at_chance_and_fall(beauty):
    "Untrained, the loss is the mean logarithm of the number of tokens that can follow; a few steps bring it down."
    model, _ = made(beauty)
    batch = collate(beauty, beauty.train, np.arange(24), 10_000)
    prediction = model(batch)
    first = float(CE()(prediction, None).detach())
    assert first == pytest.approx(np.log(choices(model, prediction)), rel=.05)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss = CE()(model(batch), None)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first - .5
    whole, inside = token_losses(model.writer, batch)
    assert inside.mean() < whole.mean()


def test_frequencies_in_the_trie(beauty):
    "Most tokens of an id follow from those before: the entropy of frequencies among what may follow is a small part of that among all."
    items = load_items("beauty", beauty, GRAM.sides, encoder="tfidf")
    ids, seen = items["ids"].tokens, beauty.train.target
    count = 1 + torch.from_numpy(np.bincount(ids[seen].ravel(), minlength=items["ids"].n_tokens)).float()
    asked = torch.from_numpy(ids[beauty.test.target])
    inside = in_trie(count, asked, make_trie(ids))[asked != 0].mean()
    whole = -(count / count[1:].sum()).log()[asked[asked != 0]].mean()
    assert 0 < inside < whole / 3


def test_neighbors_of_training_histories(beauty):
    near = next_to(beauty, 2)
    assert near.shape == (12_102, 2) and not near[0].any() and (near >= 0).all()


def test_published_preset_says_what_is_missing(beauty, shared_data):
    config = configure(model="gram", preset="published", dataset="beauty", set="data.users=200 data.encoder=tfidf")
    with pytest.raises(PromptError, match="model.tokenizer=FILE"): prepare(config, None)
