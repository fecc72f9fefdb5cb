"""Texts and attributes of the two real catalogues."""

import numpy as np
import pytest

from mbnb import datasets


@pytest.mark.parametrize(("name", "codes"), [("ml-100k", 19), ("beauty", 637)])
def test_every_item_has_a_text(shared_data, name, codes):
    s = datasets.load(name)
    made = datasets.load_items(name, s, {"text": "needed", "attributes": "needed"})
    assert made["text"].has[1:].all() and made["attributes"].values.shape == (s.n_items + 1, codes)


def test_neighbors_by_text_share_genres(shared_data):
    s = datasets.load("ml-100k")
    made = datasets.load_items("ml-100k", s, {"text": "needed", "attributes": "needed"})
    x, genres = made["text"].values[1:], made["attributes"].values[1:]
    near = (x @ x.T - 2 * np.eye(len(x))).argmax(1)
    shared = lambda other: ((genres * genres[other]).sum(1) > 0).mean()
    assert shared(near) > shared(np.random.default_rng(0).permutation(len(x))) + 0.15
