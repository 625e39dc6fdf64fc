"""What a broadcast of weights over a process group would take, beside the files of benchmarks/weights.py: 135 million
fp32 numbers by gloo, from one process to one and to two others on this machine.

python benchmarks/broadcast.py      # half a minute, 3 GB of memory; one JSON line
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine  # noqa: E402
from examples.stages import free_port  # noqa: E402

NUMBERS = 135_000_000
ROUNDS = 5  # after one to warm up


def work(rank: int, processes: int, port: int, told):
    """Takes part in the broadcasts; the process that has the weights tells the median of their seconds."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    weights = torch.full((NUMBERS,), float(rank == 0))
    seconds = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        dist.broadcast(weights, 0)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    assert weights.min() == 1
    if rank == 0:
        told.put(statistics.median(seconds[1:]))


def main():
    found, told = {}, mp.get_context("spawn").SimpleQueue()
    for receivers in (1, 2):
        mp.spawn(work, (1 + receivers, free_port(), told), nprocs=1 + receivers)
        found[f"to {receivers}"] = told.get()
    print(json.dumps({"machine": machine(2), "MB": NUMBERS * 4 / 1e6, "seconds": found}))


if __name__ == "__main__":
    main()
