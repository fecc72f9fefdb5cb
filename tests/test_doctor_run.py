"""Finished runs: a real one is clean, and each edited copy of its folder raises the card of what was edited."""
import json
import shutil

import numpy as np
import pytest

from mbnb.doctor import across
from mbnb.doctor import run as R
from mbnb.doctor.run import check_run
from mbnb.runs import RANK_ARRAYS, RunFolder, best_words, load_run


GIVEN = dict(model="sasrec", dataset="toyshop-tiny", protocol="full, uni20", epochs=2)
SET = "model.d_model=16 eval.bootstrap=50 fit.threads=1"


def train(folder, name, set=SET, **changes):
    from mbnb.experiment import configure, run_experiment
    run_experiment(configure(runs_dir=str(folder), run_name=name, set=set, **GIVEN | changes), say=lambda text: None)
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {"a": train(folder, "a"), "b": train(folder, "b", seed=1), "test": train(folder, "test", select_on="test"),
            "wide": train(folder, "wide", lr=.003, set=SET.replace("16", "24"))}


@pytest.fixture
def copy_of(runs, tmp_path):
    def copied(name="a", **changes):
        path = shutil.copytree(runs[name], tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        for file, edit in changes.items(): edit_json(path / f"{file}.json", edit)
        return path
    return copied


def edit_json(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_ranks(path, file="ranks-test.npz", **changes):
    with np.load(path / file) as f: arrays = {k: f[k] for k in RANK_ARRAYS}
    np.savez_compressed(path / file, **{k: changes[k](v) if k in changes else v for k, v in arrays.items()})
    return path


def fired(path): return sorted((c.id, c.severity) for c in check_run(path) if c.severity in "EW")
def card(path, id, severity): return next(c for c in check_run(path) if (c.id, c.severity) == (id, severity))


def test_a_real_run_is_clean(runs):
    cards = check_run(runs["a"])
    assert {c.id for c in cards if c.severity in "EW"} <= {"D12"}               # two epochs may not beat copying
    assert {"R01", "R02", "R03", "R04", "C08"} <= {c.id for c in cards if c.severity == "ok"}
    assert all("mbnb.lint" in c.message for c in cards if c.id in R.TEXTS)
    assert all("mbnb.doctor.across" in c.message for c in cards if c.id in R.SEVERAL)


def test_a_path_and_a_run_are_the_same(runs): assert check_run(runs["a"]) == check_run(str(runs["a"])) == check_run(load_run(runs["a"]))


@pytest.mark.parametrize("name", ["HR@10", "NDCG@5", "MRR@20", "HR@10[uni20]"])
def test_r01_one_edited_value(runs, copy_of, name):
    def edit(r): r["test"][name] += .03
    path = copy_of(result=edit)
    assert ("R01", "E") in fired(path) and name in " ".join(c.message for c in check_run(path) if c.id == "R01")


def test_r01_swapped_columns(copy_of):
    def edit(r): r["test"]["HR@10"], r["test"]["HR@20"] = r["test"]["HR@20"], r["test"]["HR@10"]
    path = copy_of(result=edit)
    for file in path.glob("ranks-test*"): file.unlink()            # the identities alone find it
    assert ("R01", "E") in fired(path)


def test_r01_slices_of_another_run(copy_of):
    def edit(r): r["slices"]["repeat"]["metrics"] = {k: v * .9 for k, v in r["slices"]["repeat"]["metrics"].items()}
    path = copy_of(result=edit)
    sliced = isinstance(json.loads((path / "result.json").read_text())["slices"]["novel"]["metrics"], dict)
    assert (("R01", "E") in fired(path)) == sliced


@pytest.mark.parametrize("changes,words", [
    (dict.fromkeys(RANK_ARRAYS, lambda v: v[:-3]), "rows for"), (dict(g=lambda v: v + 1000), "are no ranks"),
    (dict(g=lambda v: np.where(np.arange(len(v)) == 4, np.nan, v)), "not finite"), (dict(case=lambda v: v // 2), "twice"),
    (dict(e=lambda v: v - 1), "are no ranks"), (dict(target=lambda v: v[::-1].copy()), "different cases")])
def test_r02_damaged_ranks(copy_of, changes, words):
    path = edit_ranks(copy_of(), **changes)
    assert words in card(path, "R02", "E").message


def test_r02_no_archive(copy_of):
    path = copy_of()
    (path / "ranks-test-uni20.npz").write_bytes(b"not an archive")
    assert "ranks-test-uni20.npz" in card(path, "R02", "E").message


def test_r02_the_data_had_more_cases(copy_of):
    def edit(c): c["data"]["cases"]["test"] += 5
    assert "the data set had" in card(copy_of(config=edit), "R02", "E").message


def test_r02_lattice_and_its_ties():
    from mbnb.evaluators.metrics import table
    from mbnb.evaluators.ranks import Ranks
    n = 80
    i = np.arange(n)
    def ranks(e): return Ranks(i, i, np.ones(n, int), i % 30, np.full(n, e), np.full(n, 100), np.zeros(n, bool))
    plain, tied = ranks(0), ranks(2)
    assert R.lattice({"test": table(plain), "n_cases": n}, {"": plain}).severity == "ok"
    assert R.lattice({"test": table(plain), "n_cases": 77}, {"": plain}).severity == "W"
    assert R.lattice({"test": table(tied), "n_cases": n}, {"": tied}).severity != "W"


def test_r03_validation_is_test(copy_of):
    path = copy_of()
    shutil.copy(path / "ranks-test.npz", path / "ranks-valid.npz")
    assert "validation cases are the test cases" in card(path, "R03", "E").message
    path = copy_of()
    test = load_run(path).result["test"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for r in lines:
        if r["kind"] == "epoch": r["metrics"] = {k: v for k, v in test.items() if "[" not in k}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert "equal those of the chosen epoch" in card(path, "R03", "E").message


def test_r03_no_test_values(copy_of):
    def edit(r): r["test"] = {}
    assert card(copy_of(result=edit), "R03", "W").message.startswith("0 test values")


def test_c08_chosen_on_the_test_by_name(runs, copy_of):
    assert ("C08", "W") in fired(runs["test"]) and card(runs["test"], "C08", "W").patch == {"select_on": "valid"}
    assert not any(id == "R03" for id, _ in fired(runs["test"]))                # its own validation cases are others
    def edit(c): c["select_on"] = "valid"
    assert ("C08", "E") in fired(copy_of("test", config=edit))                  # asked for one, did the other


def test_r12_training_that_spoils_what_it_began_with(runs):
    good = train(runs["a"].parent, "good", lr=.01, epochs=8)
    fork = train(good.parent, "spoilt", fork=str(good), lr=1., set=SET + " fit.patience=0", doctor="off")
    assert load_run(fork).result["best_epoch"] == -1
    found = card(fork, "R12", "W")
    assert found.value < found.threshold and "the best of 2 epochs" in found.message and card(good, "R12", "ok")
    assert "the weights it began with, above all 2 epochs" in best_words(load_run(fork).result)


def test_d12_copying_wins(copy_of):
    def edit(r): r["baselines"]["copy_recency"] = {"NDCG@10": .99}
    assert card(copy_of(result=edit), "D12", "W").value < .99
    def below(r): r["baselines"] = {k: ({"NDCG@10": 0.} if k.startswith("copy") else v) for k, v in r["baselines"].items()}
    assert ("D12", "W") not in fired(copy_of(result=below))


def test_r04_harmonic_mean(copy_of):
    def edit(r): r["test"]["mean rank"] = 1 / r["test"]["MRR"]
    assert "harmonic" in card(copy_of(result=edit), "R04", "W").message


def test_r05_curves():
    rng = np.random.default_rng(1)
    said = [R.winners_curse(np.r_[.1, .2, .3, .4 + .01 * rng.standard_normal(15)]).severity for _ in range(60)]
    assert said.count("I") > 45 and set(said) <= {"I", "ok", "skipped"}
    assert R.winners_curse(np.linspace(.1, .4, 20)).severity == "skipped" and R.winners_curse([.3] * 9).severity == "skipped"
    climb = np.r_[np.linspace(.1, .4, 10), np.full(10, .4) + .001 * rng.standard_normal(10)]
    assert R.plateau(climb).start >= 9


def test_an_unfinished_run_is_only_skipped(tmp_path):
    with RunFolder.create(tmp_path, "early") as run: run.status("running")
    cards = check_run(tmp_path / "early")
    assert {c.severity for c in cards} == {"skipped"} and "stopped" in cards[0].message


# ---- several runs ----

def of(paths, id): return [c for c in across.check_runs(paths) if c.id == id]


def test_two_seeds_are_one_configuration(runs):
    paths = [runs["a"], runs["b"]]
    assert [c.severity for c in of(paths, "R07")] == ["ok"] and of(paths, "C17")[0].severity == of(paths, "R09")[0].severity == "skipped"
    assert "two seeds of one configuration" in of(paths, "R08")[0].fix


def test_r09_r08_c17(runs):
    paths = [runs["a"], runs["b"], runs["wide"]]
    seeds, = of(paths, "R09")
    assert seeds.severity == "W" and "(2 seeds)" in seeds.message and "(1 seed)" in seeds.message and seeds.value == 1
    assert len(of(paths, "R08")) == 3 and all("Holm over 3 pairs" in c.message for c in of(paths, "R08"))
    knobs, = of(paths, "C17")
    assert knobs.severity == "W" and knobs.value == 2 and "model.d_model" in knobs.message and "fit.lr" in knobs.message


def test_c17_one_group_is_fine(runs):
    a, wide = load_run(runs["a"]).config, load_run(runs["wide"]).config
    wide["config"]["stages"] = a["config"]["stages"]
    assert across.knobs(wide, a).severity == "ok" and set(across.changed(a, wide)) == {"model.d_model"}
    assert across.changed(a, load_run(runs["b"]).config) == {}
    assert set(across.changed(a, load_run(runs["test"]).config)) == {"select_on"}


def test_c17_a_fork_that_is_about_to_start(runs):
    from mbnb.experiment import configure
    parent = load_run(runs["a"]).config
    again = configure(**GIVEN, set=SET).to_dict()
    assert across.changed(parent, again) == {}
    other = configure(**GIVEN | dict(lr=.01), set="model.d_model=32").to_dict()
    card = across.knobs(other, parent, "the fork", "a")
    assert card.severity == "W" and card.value == 2 and "the fork differs from a" in card.message


def test_the_fork_is_the_parent(runs):
    configs = {n: load_run(p).config for n, p in runs.items()}
    marks = dict.fromkeys(configs, {"same"})
    assert across.parent_of("wide", configs, marks) in ("a", "b")
    configs["wide"]["fork"] = "/somewhere/test"
    assert across.parent_of("wide", configs, marks) == "test"
    assert across.parent_of("a", {"a": configs["a"]}, marks) is None


def test_r07_another_question(runs, copy_of):
    def filtered(c): c["resolved"]["eval"]["seen_filter"] = "all_seen"
    def marked(r): r["fingerprints"] = dict.fromkeys(r["fingerprints"], "f" * 8)
    other = copy_of("b", config=filtered, result=marked)
    found, = of([runs["a"], other], "R07")
    assert found.severity == "E" and all(w in found.message for w in ("seen filter: none, all_seen", "full has 2", "uni20 has 2"))
    def renamed(r): r["fingerprints"] = {"pop50": "e" * 8}
    assert "share no protocol" in of([runs["a"], copy_of("b", result=renamed)], "R07")[0].message


def test_r08_other_cases_are_not_tested(runs, copy_of):
    path = edit_ranks(copy_of("b"), target=lambda v: v[::-1].copy())
    assert of([runs["a"], path], "R08")[0].severity == "skipped"


def test_one_run_and_an_unfinished_one(runs, tmp_path):
    with RunFolder.create(tmp_path, "early") as run: run.status("running")
    assert {c.severity for c in across.check_runs([runs["a"], tmp_path / "early"])} == {"skipped"}


def test_no_torch_to_import():
    import subprocess
    import sys
    code = "import mbnb.doctor.run, mbnb.doctor.across, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
