"RecTools' SASRec at the same size on the same file; prints one line of JSON. Runs in RecTools' own environment."

import argparse
import hashlib
import json
import logging
import resource
import time
import warnings

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

ap = argparse.ArgumentParser()
ap.add_argument("data")
ap.add_argument("--epochs", type=int, default=20)
ap.add_argument("--batch", type=int, default=128)
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--precision", default="32")
a = ap.parse_args()
warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(2)
seed_everything(a.seed)

rows = pd.read_csv(a.data, sep="\t")
frame = pd.DataFrame(
    {
        Columns.User: rows.user_id,
        Columns.Item: rows.item_id,
        Columns.Weight: 1.0,
        Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(rows.timestamp, unit="s"),
    }
)
age = frame.groupby(Columns.User)[Columns.Datetime].rank(method="first", ascending=False)
test, seen, train = frame[age == 1], frame[age > 1], frame[age > 2]
wall, cpu = [], []


class Clock(Callback):
    def on_train_epoch_start(self, *_):
        self.w, self.c = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, *_):
        wall.append(time.perf_counter() - self.w)
        cpu.append(time.process_time() - self.c)


def trainer():
    return Trainer(
        accelerator="cpu",
        max_epochs=a.epochs,
        min_epochs=a.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
        precision={"32": "32-true", "bf16": "bf16-mixed"}[a.precision],
    )


model = SASRecModel(
    n_blocks=2,
    n_heads=2,
    n_factors=64,
    dropout_rate=0.2,
    session_max_len=50,
    loss="softmax",
    lr=1e-3,
    batch_size=a.batch,
    epochs=a.epochs,
    recommend_torch_device="cpu",
    recommend_batch_size=1024,
    get_trainer_func=trainer,
)
model.fit(Dataset.construct(train))
begin = time.perf_counter()
top = model.recommend(
    users=test[Columns.User].unique(), dataset=Dataset.construct(seen), k=10, filter_viewed=False, on_unsupported_targets="ignore"
)
seconds = time.perf_counter() - begin
hit = top.merge(test[[Columns.User, Columns.Item]], on=[Columns.User, Columns.Item])
gain = 1 / (1 + hit[Columns.Rank]).map(lambda r: __import__("math").log2(r))
n = len(test)
mean = gain.sum() / n
lengths = train.groupby(Columns.User).size().clip(upper=51)
targets = int((lengths - 1).sum())
ids = hashlib.sha256("\n".join(sorted(f"{u} {i}" for u, i in zip(test[Columns.User], test[Columns.Item]))).encode()).hexdigest()
print(
    json.dumps(
        {
            "peer": "rectools-0.19.0",
            "precision": a.precision,
            "epochs": a.epochs,
            "targets_per_epoch": targets,
            "targets_per_cpu_second": targets * (a.epochs - 1) / sum(cpu[1:]),
            "train_seconds": sum(wall),
            "eval_seconds": seconds,
            "ndcg10": mean,
            "se": ((gain**2).sum() / n - mean**2) ** 0.5 / n**0.5,
            "params": sum(p.numel() for p in model.lightning_model.torch_model.parameters()),
            "test_items": ids[:12],
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
