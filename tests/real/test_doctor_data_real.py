"""The doctor's questions to the real data sets: what is known of them is found, and no E stops a run on them."""
import time

import numpy as np
import pytest

from mbnb import datasets
from mbnb.doctor.data import check_data, constant_candidates, coverage
from mbnb.evaluators.baselines import rank_baselines
from mbnb.evaluators.metrics import table
from mbnb.evaluators.protocols import make_plan
from mbnb.events import DataError

pytestmark = pytest.mark.real_data


def plans_of(s, name):
    row = datasets.spec(name)
    file = datasets.data_file(name, row.candidates) if row.candidates else None
    files = {p: file if p.startswith("fixed") else None for p in row.protocols}
    return [make_plan(s, s.test, p, seen_filter=row.seen_filter, split="test", candidate_file=files[p]) for p in files]


def copies(s, plans):
    ranked = rank_baselines(s, s.test, plans[:1], ["copy_recency", "copy_pop", "copy_count", "copy_behavior"])
    return {rule: table(found[""]) for rule, found in ranked.items()}


@pytest.fixture(scope="module")
def retail(shared_data):
    s = datasets.load("retail_beh")
    plans = plans_of(s, "retail_beh")
    return s, plans, copies(s, plans)


@pytest.fixture(scope="module")
def cards(retail):
    s, plans, rules = retail
    started = time.process_time()
    found = check_data(s, max_len=200, plans=plans, rules=rules)
    assert time.process_time() - started < 5
    return {c.id: c for c in found}


def test_retail_numbers(cards):
    assert cards["D03"].severity == "I" and cards["D03"].message == "max_len 200, mean 15.0: 92 % padding"
    assert cards["D11"].severity == "W" and cards["D11"].message.startswith("253 of 2,000 test rows (12.65 %)")
    assert cards["D12"].severity == "I" and cards["D12"].message.startswith("rho 99.3 % (1,986 of 2,000 test targets")
    assert cards["D13"].severity == "I" and cards["D13"].message == (
        "133 of 2,000 test targets = 6.65 % occur in no training or validation row, 158 = 7.90 % in no row that is trained on")
    assert cards["D17"].severity == "W" and cards["D17"].message == "fixed100: all 2,000 cases share one list of 100 ids"
    assert {c.id for c in cards.values() if c.severity in "EW"} == {"D11", "D17"}


def test_retail_copying(retail, cards):
    "The best rule stands in the card; copying by recency alone has HR@10 .986."
    s, _, rules = retail
    assert rules["copy_recency"]["HR@10"] == pytest.approx(.986, abs=5e-5)
    best = max(rules, key=lambda r: rules[r]["HR@10"])
    assert f"copying the history ({best}) has HR@10 {rules[best]['HR@10']:.3f}".replace("0.", ".") in cards["D12"].message
    alone = check_data(s, max_len=200, rules={"copy_recency": rules["copy_recency"]})
    assert "(copy_recency) has HR@10 .986 on the full catalogue" in next(c for c in alone if c.id == "D12").message


def test_retail_fixed_list_as_the_first_protocol(retail):
    s, plans, _ = retail
    assert constant_candidates(plans[1].candidates, s.n_items, "fixed100", first=True).severity == "E"


FOUND = {   # data set -> (max_len, its cards of severity W); no E on any of them
    "retail_beh": (199, {"D11", "D17"}),
    "beauty": (50, set()),
    "taobao": (50, {"D02", "D03", "D08", "D13"}),
    "taobao-category": (50, {"D02", "D03", "D08"}),
    "kuairand": (50, {"D03", "D09"}),
    "kuairand-impression": (50, {"D03"}),
}


@pytest.mark.parametrize("name", FOUND)
def test_no_real_data_set_is_refused(name, shared_data):
    s = datasets.load(name)
    cards = check_data(s, max_len=FOUND[name][0], plans=plans_of(s, name))
    assert not [c for c in cards if c.severity == "E"]
    assert {c.id for c in cards if c.severity == "W"} == FOUND[name][1]


def test_ml_100k():
    try: s = datasets.load("ml-100k")
    except DataError as e: pytest.skip(f"ml-100k cannot be had here: {e}")
    printed = {"users": 943, "items": 1_682, "rows": 100_000}
    cards = {c.id: c for c in check_data(s, max_len=50, plans=plans_of(s, "ml-100k"), printed=printed)}
    assert {i: c.severity for i, c in cards.items() if c.severity in "EW"} == {"D03": "W", "D08": "W"}
    assert cards["D08"].message.startswith("44.0 % of 943 test cases tie")
    assert cards["D15"].severity == cards["D17"].severity == "ok"
    mixed = check_data(s, max_len=50, printed={"users": 938, "items": 1_682})
    assert next(c for c in mixed if c.id == "D15").severity == "W"


def test_beauty_item_table_with_titles(shared_data):
    "F44 on real keys: tokens followed by a title are found nowhere, until the first blank."
    s = datasets.load("beauty")
    card = coverage([f"{t} a title of some words" for t in s.items[1:]], s.items[1:])
    assert card.severity == "E" and "0 of 12,101 items found; all 12,101 match if keys end at the first blank" in card.message
    ids = np.array(s.items[1:], str)
    assert coverage(ids, s.items[1:]).severity == "ok"
