"""`coati serve-reward`: 2,000 requests of 50 clients, a response each.

    python benchmarks/serve_rewards.py               # a minute or two on idle cores; one JSON line
    python benchmarks/serve_rewards.py --save        # and writes benchmarks/results/serve_rewards.json

The server is a process of its own, the clients run on the same machine; each sends its next request when it has the
reply to the one before. `exact` compares texts, so that what is measured is the server; `model` is a random reward
model of 5.8 M parameters (`generation.py`) that reads responses of 100 to 200 tokens.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import machine, store
from benchmarks.generation import MODEL
from benchmarks.serve import write_model


def write_reward_model(folder: str):
    """A random one, with a tokenizer that has a token for each of its rows."""
    import torch

    from coati.models import RewardModel

    write_model(folder, {})
    torch.manual_seed(0)
    model = RewardModel(folder)
    torch.nn.init.normal_(model.value_head.weight)
    model.save_pretrained(folder)


def response(draw: random.Random) -> str:
    return " ".join(f"<{draw.randrange(2, MODEL['vocab_size'])}>" for _ in range(draw.randint(100, 200)))


async def ask(address: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """Seconds in all, and of each reply. Raises if a reply is none, or isn't of its response."""
    import httpx

    async def client(seed: int) -> list[float]:
        draw, waits = random.Random(seed), []
        async with httpx.AsyncClient(timeout=None, verify=False) as mine:
            for _ in range(requests // clients):
                body = {"prompts": ["<2>"], "responses": [response(draw)], "columns": {"answer": ["<2>"]}}
                sent = time.perf_counter()
                reply = await mine.post(f"{address}/score", json=body)
                waits.append(time.perf_counter() - sent)
                reply.raise_for_status()
                assert len(reply.json()["rewards"]) == 1
        return waits

    started = time.perf_counter()
    waits = await asyncio.gather(*(client(seed) for seed in range(clients)))
    return time.perf_counter() - started, sorted(seconds for of_client in waits for seconds in of_client)


def measure(entry: str, options: argparse.Namespace) -> dict:
    """Of one reward, after a round to warm up."""
    command = [sys.executable, "-m", "coati.cli", "serve-reward", "--rewards", entry, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stdout if "http://" in line)
            address = next(word for word in said.split() if word.startswith("http://")).removesuffix("/score")
            asyncio.run(ask(address, options.clients, options.clients))
            seconds, waits = asyncio.run(ask(address, options.clients, options.requests))
        finally:
            process.terminate()
    return {
        "requests": len(waits),
        "requests_per_second": len(waits) / seconds,
        "seconds": {name: waits[int(share * (len(waits) - 1))] for name, share in (("median", 0.5), ("p99", 0.99))},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2000, help="of all clients")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serve_rewards.json")
    options = parser.parse_args()
    found = {"machine": machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))), "model": MODEL}
    found |= {"clients": options.clients, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_reward_model(folder)
        for name, entry in (("exact", "exact"), ("model", f"{{type: model, path: {folder}}}")):
            found["cases"][name] = measure(entry, options)
            if options.save:
                store(found, "serve_rewards", "cases")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
