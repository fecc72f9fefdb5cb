"""Write metrics.npz: 500 single-target and 500 multi-target cases with the values that trec_eval (through ir-measures) gives them.

    python tests/golden/make_metrics.py

Needs ir-measures and pytrec_eval-terrier. `trec_values` is also what the live comparison in tests/test_metrics.py calls.
Arrays: scores (1000,M) int16, no two of a row equal; offsets (1001,) and targets (T,): the targets of case n are
targets[offsets[n]:offsets[n+1]]; values (1000, measures, cutoffs) float64; measures, cutoffs: their names.
"""
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("metrics.npz")
CUTOFFS = (1, 5, 10, 20, 50)
MEASURES = ("Success", "R", "P", "nDCG", "AP", "RR")     # trec_eval's names, as ir-measures writes them


def draw(n, m, seed, max_targets):
    "scores (n,m) int16 without ties and a list of n target arrays; each case has 1..max_targets targets."
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(m, dtype=np.int16), (n, 1)), axis=1)
    return scores, [np.sort(rng.choice(m, rng.integers(1, max_targets + 1), replace=False)) for _ in range(n)]


def trec_values(scores, targets):
    "float64 (n, measures, cutoffs): each case scored by trec_eval. Cut-off RR: trec_eval's recip_rank of the list cut at K."
    import ir_measures
    import pytrec_eval

    n, cases = len(scores), [f"q{i}" for i in range(len(scores))]
    qrels = {q: {f"d{j}": 1 for j in t} for q, t in zip(cases, targets)}
    run = {q: {f"d{j}": float(s) for j, s in enumerate(row)} for q, row in zip(cases, scores)}
    out = np.full((n, len(MEASURES), len(CUTOFFS)), np.nan)
    wanted = [ir_measures.parse_measure(f"{x}@{k}") for x in MEASURES[:-1] for k in CUTOFFS]
    place = {str(w): (MEASURES.index(str(w).split("@")[0]), CUTOFFS.index(int(str(w).split("@")[1]))) for w in wanted}
    for r in ir_measures.pytrec_eval.iter_calc(wanted, qrels, run): out[(int(r.query_id[1:]), *place[str(r.measure)])] = r.value
    for c, k in enumerate(CUTOFFS):
        top = {q: dict(sorted(docs.items(), key=lambda d: -d[1])[:k]) for q, docs in run.items()}
        found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
        out[:, MEASURES.index("RR"), c] = [found[q]["recip_rank"] for q in cases]
    assert np.isfinite(out).all()
    return out


if __name__ == "__main__":
    parts = [draw(500, 80, seed=1, max_targets=1), draw(500, 80, seed=2, max_targets=12)]
    scores, targets = np.concatenate([p[0] for p in parts]), parts[0][1] + parts[1][1]
    np.savez_compressed(GOLDEN, scores=scores, offsets=np.append(0, np.cumsum([len(t) for t in targets])),
                        targets=np.concatenate(targets).astype(np.int16), values=trec_values(scores, targets),
                        measures=np.array(MEASURES), cutoffs=np.array(CUTOFFS))
    print(GOLDEN, GOLDEN.stat().st_size, "bytes")
