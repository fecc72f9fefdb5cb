"""TIGER and the search: what its page does not show."""

import itertools

import numpy as np
import pytest
import torch

from mbnb import datasets
from mbnb.checks import awake, build, random_batch, widen
from mbnb.events import MbnbError
from mbnb.experiment import build_items, build_model, configure, rank_model, build_plans
from mbnb.fit import fit, seed_everything
from mbnb.models.tiger import TIGER
from mbnb.search import SearchError, beam_search, make_trie, over_catalogue
from mbnb.sequences import Batch, prefixes


def every_id(codes, levels):
    return np.array([[0] * levels, *itertools.product(range(1, codes + 1), repeat=levels)])


def paths(trie):
    "All rows of tokens that a search may write."
    rows, node = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for level in trie.levels:
        keep = level.node[node] >= 0
        rows = torch.cat([rows.repeat_interleave(keep.sum(1), 0), level.token[node][keep][:, None]], 1)
        node = level.node[node][keep]
    return rows, trie.item[node]


@pytest.mark.parametrize("seed", range(3))
def test_a_trie_admits_its_ids_and_no_other(seed):
    rng = np.random.default_rng(seed)
    ids = every_id(4, 3)[np.append(0, rng.choice(np.arange(1, 65), 30, replace=False))]
    rows, items = paths(make_trie(ids))
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, ids[1:].tolist()))
    assert (torch.from_numpy(ids)[items] == rows).all()


def test_ids_of_several_lengths_end_where_they_end():
    ids = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0], [2, 4, 5, 0], [2, 4, 6, 7]])
    rows, items = paths(make_trie(ids))
    assert rows[items.argsort()].tolist() == ids[1:].tolist()


UNFIT = [([[0, 0], [1, 2], [1, 2]], "share"), ([[0, 0], [1, 2], [1, 0]], "beginning"), ([[0, 0], [0, 0], [1, 0]], "empty")]


@pytest.mark.parametrize("ids, said", UNFIT)
def test_ids_that_cannot_be_searched_are_refused(ids, said):
    with pytest.raises(SearchError, match=said):
        make_trie(ids)


def test_beam_equals_bruteforce():
    "50 items, beam 50, two levels of context: the card's own size."
    table = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    ids = every_id(5, 3)[:51]

    class Model:
        past = None

        def __call__(self, token, came):
            token = token[..., None]
            kept = None if came is None else self.past.gather(1, came[..., None].expand(-1, -1, self.past.shape[2]))
            self.past = token if came is None else torch.cat([kept, token], 2)
            p = torch.nn.functional.pad(self.past, (1, 0))
            return table[p[..., -2], p[..., -1]]

    items, scores = beam_search(Model(), make_trie(ids), 3, 50)
    rows = [[0, 0, *row] for row in ids[1:].tolist()]
    by_hand = torch.tensor([sum(float(table[r[q], r[q + 1], r[q + 2]]) for q in range(3)) for r in rows])
    assert items[0].tolist() == (by_hand.argsort(descending=True, stable=True) + 1).tolist()
    assert torch.allclose(scores[0], by_hand.sort(descending=True).values, atol=1e-5)
    assert (items == items[0]).all()


@pytest.mark.parametrize("width", [1, 5, 17, 200])
def test_beam_all_valid(width):
    "Whatever the model says, k different items come back, best first."
    ids, g = every_id(3, 4), torch.Generator().manual_seed(width)
    def says(token, came): return torch.randn(*token.shape, 4, generator=g).mul(9).log_softmax(-1)

    items, scores = beam_search(says, make_trie(ids), 6, width)
    k = min(width, 81)
    assert items.shape == (6, k) and items.min() > 0
    assert all(len(set(row)) == k for row in items.tolist())
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_a_token_of_no_chance_does_not_end_a_beam():
    "A model that gives every allowed token the probability 0 in float32 still answers with items."
    ids = every_id(3, 2)
    items, scores = beam_search(lambda token, came: torch.full((*token.shape, 4), -1e30), make_trie(ids), 2, 4)
    assert items.min() > 0 and scores.isfinite().all()


def test_over_catalogue_leaves_the_rest_out():
    z = over_catalogue(torch.tensor([[3, 1, 0]]), torch.tensor([[-1.0, -2.0, -torch.inf]]), 5)
    assert z.tolist() == [[-torch.inf, -2.0, -torch.inf, -1.0, -torch.inf]]


def test_recommend_widens_the_beam_by_what_is_excluded():
    model, batch = awake(build(TIGER, n_items=200, beam=1)), random_batch(200)
    best = model.recommend(batch, 60)[0]
    out = Batch(**{**batch.__dict__, "exclude": best[:, :20]})
    rest = model.recommend(out, 60)[0]
    assert not (rest[:, :, None] == best[:, None, :20]).any()
    assert all(len(set(row)) == 60 for row in rest.tolist())


def test_k_beyond_the_catalogue_is_filled_with_the_pad():
    model, batch = awake(build(TIGER)), random_batch(40)
    ids, scores = model.recommend(batch, 45)
    assert (ids[:, 40:] == 0).all() and (scores[:, 40:] == -torch.inf).all() and (ids[:, :40] > 0).all()


def test_a_model_without_ids_says_so():
    c = TIGER.Config.small(40, n_users=5, n_tokens=9, id_length=2)
    with pytest.raises(ValueError, match="prepare"):
        TIGER(c).score(random_batch(40))


def test_ids_of_another_catalogue_are_refused():
    model = build(TIGER)
    other = build(TIGER, n_items=50)
    from mbnb.checks import random_items

    with pytest.raises(ValueError, match="ids.*expected"):
        model.prepare(None, random_items(50))
    assert other.ids.shape[0] == 51


def test_every_beginning_is_an_example():
    batch = random_batch(40, B=4, L=6)
    row, window, target = prefixes(batch, 3)
    assert len(row) == int(batch.length.sum())
    p = build(TIGER, among="tokens")(batch)
    assert len(p.targets) == int((build(TIGER).ids[target] != 0).sum())
    assert build(TIGER)(batch).among.gt(0).sum(1).min() > 1


def test_the_beginning_of_an_id_alone_does_not_know_its_end():
    "Teacher forcing: the state of digit q does not see digit q or later ones."
    model, batch = awake(build(TIGER)), random_batch(40)
    items, user = batch.item_seq, batch.user
    ids = model.ids[batch.target].clone()
    changed = ids.clone()
    changed[:, -1] = changed[:, -1].roll(1)
    a, b = model.written(items, user, ids), model.written(items, user, changed)
    assert (ids != 0).all() and (changed != ids).any()
    assert torch.equal(a, b) and a.shape == (*ids.shape, model.config.d_model)


def test_users_in_one_bucket_share_their_token():
    model = build(TIGER, n_buckets=3)
    assert set(model.bucket(torch.arange(50)).tolist()) == {0, 1, 2}
    assert build(TIGER, n_buckets=0).users is None


def test_wider_batches_and_other_companions_change_nothing():
    model, batch = awake(build(TIGER)), random_batch(40, B=5)
    def one(n): return Batch(**{k: (v[n:n + 1] if torch.is_tensor(v) else v) for k, v in batch.__dict__.items()})

    alone = torch.cat([model.score(one(n)) for n in range(5)])
    for other in (model.score(batch), model.score(widen(batch, 4))):
        assert torch.allclose(other[:, 1:], alone[:, 1:], atol=1e-4)


def test_protocols_with_drawn_candidates_are_refused_before_training(tmp_path):
    from mbnb.experiment import run_experiment

    with pytest.raises(MbnbError, match="searches the catalogue.*full"):
        run_experiment(configure(model="tiger", dataset="toyshop-tiny", protocol="uni20", runs_dir=str(tmp_path)), say=str)


@pytest.fixture(scope="module")
def few():
    config = configure(model="tiger", dataset="toyshop-tiny", max_len=4, set="data.users=40 eval.valid_cases=30 model.chunk=256")
    s = datasets.load("toyshop-tiny", users=40)
    items = build_items(config, s)
    return config, s, items


def test_targets_outside_the_beam_are_misses(few):
    config, s, items = few
    seed_everything(0)
    model, _ = build_model(config, s, items)
    model = model.eval()
    plans = build_plans(config, s, "test")
    found = rank_model(config, s, model, "test", plans)[""]
    lost = found.g >= found.m
    assert 0 < lost.sum() < len(lost)                    # a beam of 50 over 100 items, weights by chance
    assert (found.g[~lost] < 50).all()


def test_valid_cases_limits_what_chooses_the_epoch(few):
    from mbnb.experiment import prepare

    parts = prepare(few[0], None)
    assert len(parts.sequences.valid) == 30 and len(parts.sequences.test) == 40


def test_best_is_restored(few):
    "After training the model holds the weights of its best epoch, not of the last one."
    config, s, items = few
    seed_everything(0)
    model, _ = build_model(config, s, items)
    values, held = iter([0.1, 0.5, 0.2, 0.1]), []

    def evaluate(model):
        held.append(model.tokens.weight.detach().clone())
        return {"value": next(values), "error": 0.01}

    from dataclasses import replace

    from mbnb.losses.ce import CE

    stages = [replace(config.stages[0], epochs=3, warmup=0)]
    for _ in fit(model, {None: CE()}, s, stages, config.fit, evaluate):
        pass
    assert torch.equal(model.tokens.weight, held[1]) and not torch.equal(held[1], held[3])
