"RecBole's SASRec at its own defaults on the same file: a few timed batches; prints one line of JSON. Runs in RecBole's own environment."

import argparse
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ap = argparse.ArgumentParser()
ap.add_argument("data")
ap.add_argument("--batches", type=int, default=4)
ap.add_argument("--batch", type=int, default=2048)
a = ap.parse_args()
sys.argv = sys.argv[:1]
warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)
from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.utils import get_model, get_trainer, init_seed  # noqa: E402

logging.disable(logging.WARNING)
home = Path(tempfile.mkdtemp())
(home / "set").mkdir()
pd.read_csv(a.data, sep="\t").set_axis(["user_id:token", "item_id:token", "timestamp:float"], axis=1).to_csv(
    home / "set" / "set.inter", sep="\t", index=False
)
config = Config(
    model="SASRec",
    dataset="set",
    config_dict={
        "data_path": str(home),
        "checkpoint_dir": str(home / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": 50,
        "train_neg_sample_args": None,
        "train_batch_size": a.batch,
        "use_gpu": False,
        "show_progress": False,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
    },
)
init_seed(0, True)
dataset = create_dataset(config)
train, _, _ = data_preparation(config, dataset)
model = get_model("SASRec")(config, train._dataset)
trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
model.train()
wall, cpu, rows = [], [], []
for k, batch in enumerate(train):
    if k > a.batches:
        break
    w, c = time.perf_counter(), time.process_time()
    with torch.autograd.set_detect_anomaly(True):  # as its trainer does for every sequential model
        trainer.optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        trainer.optimizer.step()
    wall.append(time.perf_counter() - w)
    cpu.append(time.process_time() - c)
    rows.append(len(batch))
print(
    json.dumps(
        {
            "peer": "recbole-1.2.1",
            "batches": a.batches,
            "targets_per_epoch": len(train._dataset),
            "targets_per_cpu_second": sum(rows[1:]) / sum(cpu[1:]),
            "batch_seconds": statistics.median(wall[1:]),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )
)
