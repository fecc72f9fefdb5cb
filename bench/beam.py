"""Beam search under a trie: ours, where the beams of a user are queries on one memory, beside `generate` of transformers with `prefix_allowed_tokens_fn`, which copies the memory for each beam.
One small T5 with random weights, read by both, made-up ids of four tokens for 12,101 items, histories of 20 items. Both must name the same items. Median seconds of the
repeats, the two in turn, after one that warms up. One JSON line."""

import argparse
import json
import statistics
import tempfile
import time

import numpy as np
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mbnb.search import beam_search, make_trie
from mbnb.seq2seq import Decoder, Encoder, read_t5

ap = argparse.ArgumentParser()
ap.add_argument("--items", type=int, default=12_101)
ap.add_argument("--users", type=int, default=16)
ap.add_argument("--beam", type=int, default=50)
ap.add_argument("--tokens", type=int, default=81, help="tokens of a history")
ap.add_argument("--width", type=int, default=64)
ap.add_argument("--repeats", type=int, default=3)
ap.add_argument("--threads", type=int, default=1)
a = ap.parse_args()
torch.set_num_threads(a.threads)
torch.manual_seed(0)
LEVELS, CODES = 4, 256

rng = np.random.default_rng(0)
codes = np.unique(rng.integers(0, CODES, (4 * a.items, LEVELS)), axis=0)
codes = codes[rng.permutation(len(codes))[: a.items]]
ids = np.vstack([np.zeros((1, LEVELS), int), codes + 1 + CODES * np.arange(LEVELS)])
item_of = {tuple(row): v for v, row in enumerate(ids.tolist())}
V = 1 + LEVELS * CODES

theirs = T5ForConditionalGeneration(
    T5Config(vocab_size=V, d_model=a.width, d_kv=a.width // 4, d_ff=4 * a.width, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)
).eval()
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    sizes, weights = read_t5(folder)
parts = (sizes["d"], sizes["ff"], sizes["n_heads"], sizes["d_head"], 2, 0.0)
ours = nn.ModuleDict({"tokens": nn.Embedding(V, a.width), "encoder": Encoder(*parts), "decoder": Decoder(*parts)}).eval()
ours.load_state_dict(weights)

read = torch.randint(1, V, (a.users, a.tokens))
real = torch.ones_like(read, dtype=torch.bool)
trie = make_trie(ids)
after = {}
for row in ids[1:].tolist():
    for q in range(LEVELS):
        after.setdefault(tuple(row[:q]), set()).add(row[q])
after = {k: sorted(v) for k, v in after.items()}


@torch.inference_mode()
def search():
    past = ours["decoder"].begin(ours["encoder"](ours["tokens"](read), real), real)

    def advance(token, came):
        return (ours["decoder"].step(ours["tokens"](token), past, came) @ ours["tokens"].weight.T * a.width**-0.5).log_softmax(-1)

    return beam_search(advance, trie, a.users, a.beam)


@torch.inference_mode()
def generate():
    found = theirs.generate(
        input_ids=read, attention_mask=real.long(), num_beams=a.beam, num_return_sequences=a.beam, max_new_tokens=LEVELS, min_new_tokens=LEVELS, length_penalty=0.0, do_sample=False,
        prefix_allowed_tokens_fn=lambda row, past: after.get(tuple(past.tolist()[1:]), [0]), return_dict_in_generate=True, output_scores=True,
    )
    items = torch.tensor([item_of[tuple(s)] for s in found.sequences[:, 1:].tolist()])
    return items.view(a.users, a.beam), found.sequences_scores.view(a.users, a.beam)


took = {"mbnb": [], "transformers": []}
for _ in range(a.repeats + 1):
    for name, call in (("mbnb", search), ("transformers", generate)):
        start = time.perf_counter()
        items, scores = call()
        took[name].append(time.perf_counter() - start)
        if name == "mbnb":
            mine, own = items, scores
same = np.mean([len(set(x) & set(y)) / a.beam for x, y in zip(mine.tolist(), items.tolist())])
seconds = {name: round(statistics.median(t[1:]), 4) for name, t in took.items()}
print(json.dumps({"bench": "beam", "items": a.items, "users": a.users, "beam": a.beam, "tokens": a.tokens, "width": a.width, "threads": a.threads, "repeats": a.repeats, "torch": torch.__version__,
                  "seconds": seconds, "times_faster": round(seconds["transformers"] / seconds["mbnb"], 1), "same_items": round(float(same), 4), "largest_difference_of_scores": round(float((own - scores).abs().max()), 6)}))
