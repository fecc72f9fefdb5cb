"Two dozen made-up reports, half of them sound: what the linter finds, and that it leaves the sound ones alone."
from pathlib import Path

import pytest

from mbnb.lint import lint_report

REPORTS = Path(__file__).parent / "golden" / "reports"
PLANTED = {
    "f01_stats_en": {("D01", 7), ("D01", 8), ("D02", 9)},
    "f02_neg_zh": {("C01", 9), ("C09", 17)},
    "f03_lightning_en": {("T03", 14)},
    "f04_protocol_zh": {("C07", 7), ("R04", 15)},
    "f05_loss_en": {("C02", 5), ("C09", 9)},
    "f06_noise_zh": {("R06", 10), ("R06", 14)},
    "f07_beauty_en": {("T05", 7), ("T07", 15)},
    "f08_recbole_zh": {("R03", 37), ("T06", 33)},
    "f09_shift_en": {("R01", 9), ("R06", 15)},
    "f10_lattice_zh": {("R02", 3), ("R07", 24)},
    "f11_attrib_en": {("C17", 5), ("R10", 16), ("R10", 18)},
    "f12_ml100k_zh": {("R11", 18), ("R09", 23)},
}


def found(name): return {(c.id, c.line): c for c in lint_report(REPORTS / f"{name}.md") if c.severity in "EW"}


@pytest.mark.parametrize("name", sorted(p.stem for p in REPORTS.glob("s*.md")))
def test_a_sound_report_gets_no_card(name):
    assert not {k: c.message for k, c in found(name).items()}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name):
    cards = found(name)
    assert PLANTED[name] <= set(cards), PLANTED[name] - set(cards)
    assert all(any(x.isdigit() for x in c.message) and c.fix for c in cards.values())


def test_no_report_is_forgotten():
    assert {p.stem for p in REPORTS.glob("f*.md")} == set(PLANTED) and len(list(REPORTS.glob("s*.md"))) == 12
