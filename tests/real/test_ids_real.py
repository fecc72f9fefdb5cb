"""Generated ids of Beauty: the files that others published, and those made from its texts."""

from collections import Counter

import numpy as np
import pytest

from mbnb import datasets
from mbnb.doctor.data import bijection
from mbnb.events import DataError
from mbnb.ids import read_column, read_lexical, read_semantic

LEXICAL = "item_generative_indexing_hierarchy_v1_c128_l7_len32768_split.txt"
BLANK = """B00JFH095K B00JGCU60W B0062W4J6Q B007UZO2N4 B007UZO2GG B0055HYT78 B00HAPQT7Q
           B00HAQAREQ B00HAQH3NY B00HB831SM B00HHECHLC B00GYJWL7G B00IKKORVU""".split()


@pytest.fixture(scope="module")
def beauty(shared_data):
    return datasets.load("beauty")


@pytest.fixture(scope="module")
def file(shared_data):
    return lambda name: datasets.data_file("beauty", name)


def ids_of(beauty, how):
    return datasets.load_items("beauty", beauty, {"ids": "rqkmeans"}, ids=how)["ids"]


def depths(table):
    "Distinct beginnings of 1, 2, ... tokens."
    return [len(np.unique(table.tokens[1:, : d + 1], axis=0)) for d in range(table.length)]


def test_lexical_ids_are_a_bijection_over_all_items(beauty, file):
    """Every one of the 12,101 items has its id, piece by piece as in the file, and the id leads back to it; the facts of the card."""
    found, table = read_lexical(file(LEXICAL)), ids_of(beauty, LEXICAL)
    asin = {n: a for a, n in datasets.product_numbers().items()}
    token = {w: t for t, w in enumerate(table.words)}
    assert len(found) == len(asin) == 12_101
    for v in range(1, 12_102):
        own = table.spelled(v)
        assert own == found[asin[beauty.items[v]]]
        assert table.lookup[tuple(token[p] for p in own)] == v
    assert Counter((table.tokens[1:] > 0).sum(1).tolist()) == {7: 11_668, 8: 433}
    assert table.n_tokens - 1 == 9_864 and len(table.lookup) == 12_101
    assert depths(table) == [108, 6_600, 10_126, 11_257, 11_640, 11_770, 11_855, 12_101]
    begun = {own[:k] for own in found.values() for k in range(1, len(own))}
    assert not begun & set(found.values())
    assert bijection(table.tokens[1:]).severity == "ok"


def test_the_column_of_the_table_holds_the_same_ids(beauty, file):
    a, b = ids_of(beauty, LEXICAL), ids_of(beauty, "beauty_item_table.tsv:lexical_id_gram")
    assert a.hash == b.hash and b.source == "beauty_item_table.tsv:lexical_id_gram"


def test_letter_is_refused_with_names(beauty, file):
    "12,088 distinct ids for 12,101 items: 13 collisions, which D06 sees in the bare codes as well."
    codes = read_semantic(file("beauty_item_table.tsv"), "sid_letter")
    assert len(codes) == 12_101 and len(set(codes.values())) == 12_088
    names = r"sid_letter: items '\d+' and '\d+' share the id a\d+ b\d+ c\d+ d\d+ "
    with pytest.raises(DataError, match=names + r"\(13 such collisions among 12,101 items\)"):
        ids_of(beauty, "beauty_item_table.tsv:sid_letter")
    card = bijection(np.array(list(codes.values())))
    assert card.severity == "E" and "24 of 12,101 items share" in card.message


@pytest.mark.parametrize("column", ["sid_rqvae_tiger", "sid_rqkmeans_tiger"])
def test_blank_ids_get_a_group_of_their_own(beauty, file, column):
    table, of = ids_of(beauty, f"beauty_item_table.tsv:{column}"), datasets.product_numbers()
    codes = read_semantic(file("beauty_item_table.tsv"), column)
    row = {str(k): v for v, k in enumerate(beauty.items)}
    assert sorted(a for a, c in codes.items() if not c) == sorted(BLANK)
    assert "13 items without codes in a group of their own" in table.source
    assert sorted(table.spelled(row[of[a]]) for a in BLANK) == sorted(("a?", "b?", "c?", f"d{k}") for k in range(13))
    size = 1 + max(max(c) for c in codes.values() if c)
    for a, own in codes.items():
        if own:
            assert table.tokens[row[of[a]]].tolist() == [1 + size * level + c for level, c in enumerate(own)]
    assert len(table.lookup) == 12_101 and size == 256


def test_a_file_of_another_catalogue_is_refused(file):
    shop = datasets.load("toyshop-tiny")
    with pytest.raises(DataError, match=r"ids for 0 of 100 items; the keys look like 'B\w+'"):
        datasets.load_items("toyshop-tiny", shop, {"ids": "rqkmeans"}, ids=str(file(LEXICAL)))["ids"]
    assert set(read_column(file("beauty_item_table.tsv"), "sid_letter")) == set(datasets.product_numbers())


@pytest.mark.parametrize("how", ["rqkmeans", "lexical"])
def test_ids_made_from_the_texts(beauty, how):
    "Each item has one, and items that begin alike have texts that are alike."
    items = datasets.load_items("beauty", beauty, {"ids": how}, encoder="tfidf")
    table, x = items["ids"], items["text"].values[1:]
    assert len(table.lookup) == 12_101 and table.length == (4 if how == "rqkmeans" else 8)
    assert 100 < depths(table)[0] <= 256 and depths(table)[1] > 3_000
    order = np.argsort(table.tokens[1:, 0], kind="stable")
    a, b = order[:-1], order[1:]
    same = table.tokens[1:][a, 0] == table.tokens[1:][b, 0]
    near, chance = (x[a[same]] * x[b[same]]).sum(1).mean(), (x * np.roll(x, 1, 0)).sum(1).mean()
    assert near > chance + 0.2


def test_similar_items_are_items(beauty):
    side = datasets.load_items("beauty", beauty, {"similar": "optional"})["similar"]
    assert side.values.shape == (12_102, 20) and side.has[1:].all() and (side.values[1:] > 0).all()
    assert not (side.values[1:] == np.arange(1, 12_102)[:, None]).any() and "outside artefact" in side.source
