"Two processes at once, forked from a server that has imported everything: what torchrun gives a process, without its start of ten seconds."
import io
import multiprocessing
import os
import socket
import traceback

import torch


def _one(rank, size, port, body, job, answers):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), GROUP_RANK="0",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    out = io.BytesIO()
    try: torch.save(body(job), out)
    except BaseException: answers.put((rank, None, traceback.format_exc()))
    else: answers.put((rank, out.getvalue(), None))


def together(body, job=None, size=2, seconds=150):
    "[what body(job) gives in each process]; `body` stands at the top level of a module. AssertionError with the traceback where one fails."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mbnb.experiment", "lightning_fabric"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers, found = context.Queue(), {}
    started = [context.Process(target=_one, args=(rank, size, port, body, job, answers), daemon=True) for rank in range(size)]
    for p in started: p.start()
    try:
        while len(found) < size:
            rank, value, error = answers.get(timeout=seconds)
            assert error is None, f"process {rank}: {error}"
            found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for p in started: p.kill()
        for p in started: p.join()
    return [found[rank] for rank in range(size)]
