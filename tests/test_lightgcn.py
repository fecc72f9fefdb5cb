"""LightGCN: the graph holds training edges alone, propagation and gradient are right, its vectors say which items go together."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mbnb import datasets
from mbnb.checks import awake, build, random_batch, widen
from mbnb.config import make_config
from mbnb.experiment import configure, preflight, prepare, run_experiment, save_item_vectors
from mbnb.doctor.data import pairs_of
from mbnb.fit import FitConfig, FitState, Stage, fit, seed_everything
from mbnb.losses.bpr import BPR
from mbnb.graph import Propagate, as_tensors, normalized, train_edges
from mbnb.models.lightgcn import LightGCN, cosine_gap
from mbnb.runs import RunError, load_run, read_checkpoint
from mbnb.sequences import Cases, collate


@pytest.fixture(scope="module")
def shop():
    return datasets.load("toyshop-tiny")


def made(shop, **changes):
    torch.manual_seed(0)
    model = LightGCN(LightGCN.Config.small(shop.n_items, len(shop.users), **changes))
    model.prepare(shop)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short run on the tiny shop."
    folder = tmp_path_factory.mktemp("runs")
    wanted = dict(dataset="toyshop-tiny", epochs=10, patience=10, lr=.02, runs_dir=str(folder), set="eval.bootstrap=50")
    return run_experiment(configure(model="lightgcn", **wanted), say=lambda line: None)


def dense(A, x, n_layers):
    "The mean of x, Ax, AAx, ..., step by step."
    layers = [x]
    for _ in range(n_layers): layers.append(A @ layers[-1])
    return torch.stack(layers).mean(0)


# ---- the graph ----

def test_graph_holds_training_edges_only(shop):
    "No edge comes from a validation or test case or from what happened after the training part."
    edges = set(map(tuple, made(shop).graph_edges()[0].T.tolist()))
    c = shop.train
    slow = {(int(u), int(v)) for u, a, b, y in zip(c.user, c.start, c.stop, c.target, strict=True) for v in (*shop.item[a:b], y)}
    assert edges == slow
    asked = set(zip(shop.test.user.tolist(), shop.test.target.tolist(), strict=True))
    assert any(pair not in edges for pair in asked)


def test_graph_coverage(shop):
    "Every item of the catalogue has a row in the matrix; empty are the pad's and those of items that training never shows."
    model = made(shop)
    degree = model.start.diff()[len(shop.users):]
    assert len(degree) == shop.n_items + 1 == len(model.item_vectors()) and degree[0] == 0
    shown = np.unique(train_edges(shop)[1])
    assert set(np.flatnonzero(degree.numpy() > 0)) == set(shown)


def test_cases_that_share_a_user_and_that_are_short():
    "Two rows of one user join; a row without input counts with its target."
    a = lambda *x: np.array(x, np.int64)
    cases = Cases(a(0, 0, 1), a(0, 0, 4), a(2, 3, 4), a(3, 4, 2), a(1, 1, 1), a(0, 0, 0))
    s = SimpleNamespace(item=a(1, 2, 2, 3).astype(np.int32), items=np.array(["", "a", "b", "c", "d"]), train=cases)
    assert train_edges(s).T.tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2]]


def test_d16_fires_on_the_edges_of_the_test(run, shop, tmp_path):
    "The preflight of a run asks the model for its graph; one that holds what is asked for is an error."
    config = configure(model="lightgcn", dataset="toyshop-tiny", runs_dir=str(tmp_path))
    parts = prepare(config, None)
    held = pairs_of(shop, "user-item", shop.test)
    parts.model.use_edges(np.unique(np.append(train_edges(shop), held, 1), axis=1))
    card = next(c for c in preflight(config, parts) if c.id == "D16")
    assert card.severity == "E" and "validation or test rows" in card.message
    assert next(c for c in load_run(run["path"]).cards if c["id"] == "D16")["severity"] == "ok"         # as it is


def test_d16_is_skipped_for_a_model_without_a_graph(tmp_path):
    config = configure(model="gru4rec", dataset="toyshop-tiny", runs_dir=str(tmp_path))
    assert next(c for c in preflight(config, prepare(config, None)) if c.id == "D16").severity == "skipped"


# ---- the propagation ----

@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_propagation_and_gradient_equal_dense_ones(shop, n_layers):
    A = normalized(train_edges(shop), len(shop.users), shop.n_items)
    x, pull = torch.randn(A.shape[0], 8, requires_grad=True), torch.randn(A.shape[0], 8)
    fast, slow = Propagate.apply(x, n_layers, *as_tensors(A)), dense(torch.from_numpy(A.toarray()), x, n_layers)
    assert torch.allclose(fast, slow, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(fast, x, pull)[0], torch.autograd.grad(slow, x, pull)[0], atol=1e-6)


def test_weights_of_edges():
    "One over the root of both degrees; symmetric; spectral norm 1."
    A = normalized(np.array([[0, 0, 1, 2], [1, 2, 2, 2]]), 3, 3).toarray()
    assert A[0, 4] == pytest.approx(1 / 2 ** .5) and A[0, 5] == pytest.approx(1 / 6 ** .5) and A[1, 5] == pytest.approx(1 / 3 ** .5)
    assert (A == A.T).all() and np.linalg.eigvalsh(A).max() == pytest.approx(1, abs=1e-6)


def test_gradient_of_the_model_equals_numbers(shop):
    "Loss of a batch against differences of itself, at a user's, a met item's and an unmet item's weight."
    model, batch = made(shop, d_model=4).double(), collate(shop, shop.train, np.arange(6), 100)
    model.weight = model.weight.double()
    def value(): p = model(batch); return BPR()(p, torch.Generator().manual_seed(0)) + p.aux["l2"]
    value().backward()
    for table, row in ((model.users, int(batch.user[0])), (model.items, int(batch.target[0])), (model.items, 7), (model.users, 150)):
        with torch.no_grad():
            table.weight[row, 1] += 1e-5; up = float(value())
            table.weight[row, 1] -= 2e-5; down = float(value())
            table.weight[row, 1] += 1e-5
        assert float(table.weight.grad[row, 1]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-8)


# ---- training ----

def test_an_epoch_is_every_edge_once_and_no_negative_is_an_own_item(shop):
    model = made(shop).train()
    p = model(collate(shop, shop.train, np.arange(len(shop.train)), model.train_len))
    assert len(p.targets) == train_edges(shop).shape[1]
    own = np.zeros((len(shop.users), shop.n_items + 1), bool); own[tuple(train_edges(shop))] = True
    user = torch.from_numpy(np.repeat(shop.train.user, own.sum(1)[shop.train.user]))
    assert all(set(np.flatnonzero(own[u])) == set(x.tolist()) - {0} for u, x in zip(user.tolist(), p.exclude, strict=True))


def test_l2_is_that_of_the_first_vectors(shop):
    model = made(shop)
    with torch.no_grad(): model.users.weight[:] = 1; model.items.weight[1:] = 2
    assert model(collate(shop, shop.train, np.arange(3), 50)).aux["l2"].item() == pytest.approx((64 + 4 * 64 + 4 * 64) / 2)


def test_training_updates_what_is_kept_for_scoring(shop):
    "Vectors kept for an evaluation do not outlive the next step."
    model, batch, seen = made(shop), collate(shop, shop.test, np.arange(4), 20), []
    def evaluate(model):
        z = model.score(batch)
        fresh = model.propagated()
        assert torch.equal(z[:, 1:], (fresh[0][batch.user] @ fresh[1].T)[:, 1:])
        seen.append(z)
        return {"value": 0., "error": 0., "metrics": {}}
    stage = Stage(epochs=2, lr=.01, loss_weights={"l2": 1e-4})
    list(fit(model, {None: BPR()}, shop, [stage], FitConfig(threads=1), evaluate, FitState(seed_everything(0))))
    assert len(seen) == 3 and not torch.equal(seen[0][:, 1:], seen[1][:, 1:]) and not torch.equal(seen[1][:, 1:], seen[2][:, 1:])


@pytest.mark.parametrize("loss", LightGCN.losses)
def test_every_loss_takes_it(shop, loss):
    from mbnb.zoo import loss_class
    made_loss, model = loss_class(loss)(), made(shop).train()
    if hasattr(made_loss, "prepare"): made_loss = made_loss.prepare(shop)
    made_loss(model(collate(shop, shop.train, np.arange(16), 100)), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_runs_in_half_precision(shop):
    model, batch = made(shop), collate(shop, shop.train, np.arange(8), 50)
    with torch.autocast("cpu", torch.bfloat16):
        BPR()(model(batch), torch.Generator().manual_seed(0)).backward()
        assert model.eval().score(batch).dtype == torch.float32


# ---- scoring ----

def test_history_is_read_for_users_without_an_edge_alone(shop):
    model, batch = made(shop).eval(), collate(shop, shop.test, np.arange(6), 30)
    z, other = model.score(batch), replace(batch, item_seq=batch.item_seq.flip(0))
    assert torch.equal(model.score(other), z)
    gone = int(batch.user[2])
    edges = train_edges(shop)
    model.use_edges(edges[:, edges[0] != gone])
    moved = (model.score(other) - model.score(batch))[:, 1:].abs().amax(1)
    assert moved[2] > 1e-6 and (moved[[0, 1, 3, 4, 5]] == 0).all()
    with torch.no_grad(): before = model.score(batch)[2]; model.users.weight[gone] += 1; assert torch.equal(model.score(batch)[2], before)


def test_padding_and_an_empty_history(shop):
    "Pads in front change nothing; without edges and without a history the scores are finite."
    model, batch = awake(build(LightGCN)), random_batch(40)
    assert torch.equal(model.score(batch), model.score(widen(batch, 3)))
    model.use_edges(np.array([[9], [1]]))
    assert not model.known[batch.user].any() and torch.allclose(model.score(batch)[:, 1:], model.score(widen(batch, 3))[:, 1:], atol=1e-6)
    assert model.score(replace(batch, item_seq=batch.item_seq * 0))[:, 1:].isfinite().all()


def test_graph_is_no_weight(shop):
    "It is not in a checkpoint, and a model that loads one over its own graph scores the same."
    a, b = made(shop).eval(), made(shop).eval()
    with torch.no_grad(): a.users.weight.add_(1)
    b.load_state_dict(a.state_dict())
    batch = collate(shop, shop.test, np.arange(6), 30)
    assert sorted(a.state_dict()) == ["items.weight", "users.weight"] and torch.equal(a.score(batch), b.score(batch))


# ---- a run, and what it leaves behind ----

def test_between_pop_and_the_oracle(run):
    assert run["baselines"]["pop"]["NDCG@10"] < run["test"]["NDCG@10"] < run["baselines"]["oracle"]["NDCG@10"]


def test_item_vectors_of_a_run(run, shop):
    "By the names of the items, without the pad, those of the best weights."
    with np.load(run["path"] + "/item_vectors.npz", allow_pickle=False) as z: names, vectors = z["item"], z["vector"]
    assert names.tolist() == [str(t) for t in shop.items[1:]] and vectors.shape == (100, 64) and vectors.dtype == np.float32
    model, saved = made(shop), read_checkpoint(run["path"], "best").weights
    model.load_state_dict({k.removeprefix("best."): v for k, v in saved.items() if k.startswith("best.")})
    assert np.allclose(vectors, model.item_vectors()[1:].numpy(), atol=1e-6)


def test_graph_is_informative(run, shop):
    "Items that follow each other are closer than random pairs; random vectors and right vectors under wrong names are not."
    with np.load(run["path"] + "/item_vectors.npz") as z: x = np.concatenate([np.zeros((1, 64)), z["vector"]])
    rng = np.random.default_rng(0)
    assert cosine_gap(x, shop) > .05
    assert abs(cosine_gap(rng.standard_normal(x.shape), shop)) < .02
    assert abs(np.mean([cosine_gap(np.concatenate([x[:1], rng.permutation(x[1:])]), shop) for _ in range(20)])) < .03


def test_vectors_of_another_catalogue_are_refused(shop, tmp_path):
    class Odd: item_vectors = staticmethod(lambda: torch.zeros(3, 4))
    with pytest.raises(RunError, match="3 rows; expected 101"): save_item_vectors(tmp_path, shop, Odd)


def test_published_preset():
    config = make_config(model="lightgcn", preset="published", dataset="toyshop-tiny")
    stage = config.stages[0]
    assert (config.loss, config.fit.tokens, stage.loss_weights) == ("bpr", 2048, {"l2": 1e-4})
    assert (stage.epochs, stage.patience, stage.lr) == (1000, 50, 1e-3)


def test_advice_that_a_model_has_no_use_for_is_left_out():
    "Beauty's row advises a dropout; a model without one can be configured all the same."
    assert "dropout" not in make_config(model="lightgcn", dataset="beauty").model
    assert make_config(model="sasrec", dataset="beauty").model["dropout"] == .5
