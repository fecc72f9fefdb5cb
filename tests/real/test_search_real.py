"""The search over Beauty's 12,101 lexical ids: it can write each of them and nothing else."""

import numpy as np
import pytest
import torch

from mbnb import datasets
from mbnb.experiment import build_items, build_model, configure
from mbnb.fit import seed_everything
from mbnb.search import make_trie
from mbnb.sequences import collate

LEXICAL = "item_generative_indexing_hierarchy_v1_c128_l7_len32768_split.txt"


@pytest.fixture(scope="module")
def parts(shared_data):
    narrow = "model.d_model=16 model.ff_dim=16 model.n_heads=2"
    config = configure(model="tiger", dataset="beauty", set=f"data.ids={LEXICAL} {narrow} fit.threads=1")
    s = datasets.load("beauty")
    return config, s, build_items(config, s)


def test_the_trie_admits_exactly_the_lexical_ids(parts):
    ids = parts[2]["ids"].tokens
    trie, row, node = make_trie(ids), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for level in trie.levels:
        keep = level.node[node] >= 0
        row = torch.cat([row.repeat_interleave(keep.sum(1), 0), level.token[node][keep][:, None]], 1)
        node = level.node[node][keep]
    assert len(row) == trie.n_items == 12_101
    assert np.array_equal(ids[trie.item[node].numpy()], row.numpy())


def test_a_beam_of_50_gives_50_different_items_to_each_of_200_users(parts):
    config, s, items = parts
    seed_everything(0)
    model = build_model(config, s, items)[0].eval()
    batch = collate(s, s.test, np.linspace(0, len(s.test) - 1, 200).astype(int), 20)
    with torch.no_grad():
        found, scores = model.search(batch, 50)
        again, _ = model.search(batch, 50)
    assert found.shape == (200, 50) and found.min() >= 1 and found.max() <= 12_101
    assert all(len(set(row)) == 50 for row in found.tolist())
    assert scores.isfinite().all() and torch.equal(found, again)
