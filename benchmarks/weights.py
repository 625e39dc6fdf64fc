"""What it takes to hand a policy's weights to a generator: seconds, bytes and memory of each side, for a model of
135 million parameters; and how much of them an update changes, which is what a transport of differences could save.

python benchmarks/weights.py            # a minute; one JSON line
python benchmarks/weights.py --save     # and writes results/weights.json and docs/asynchronous.md's table
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from coati.models import Actor, LoraSettings  # noqa: E402
from coati.rollout.remote import load_weights  # noqa: E402
from coati.rollout.remote.weights import weights_of, write_weights  # noqa: E402
from examples.stages import fill_figures, table_of  # noqa: E402

# SmolLM2-135M's
SHAPE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SHAPE |= dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp32, LoRA of rank 16": (torch.float32, LoraSettings(16)),
}
PLACES = {"disk": None, "/dev/shm": "/dev/shm"}
ROUNDS = 5
RATES = (1e-6, 1e-5)  # of an update


def policy_of(lora: LoraSettings | None, dtype: torch.dtype) -> Actor:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    return Actor(config=LlamaConfig(**SHAPE), lora=lora, dtype=dtype).eval()


def measured(function: Callable[..., Any], *arguments: object) -> tuple[float, float, Any]:
    """Seconds that a call takes, by how many MiB this process was larger meanwhile, and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, memory("VmHWM") - before, result


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def publish(policy: Actor, path: Path, dtype: torch.dtype) -> str:
    return write_weights(path, weights_of(policy, policy.state_dict(), dtype))


@torch.no_grad()
def transfer(kind: str, place: str) -> dict[str, float]:
    """Medians of writing and loading a version."""
    dtype, lora = KINDS[kind]
    trained, sampling = policy_of(lora, torch.float32), policy_of(lora, dtype)
    found: dict[str, list[float]] = {"publish": [], "publish MiB": [], "load": [], "load MiB": []}
    with tempfile.TemporaryDirectory(dir=PLACES[place]) as folder:
        path = Path(folder) / "version.safetensors"
        for _ in range(ROUNDS):
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3 * torch.randn_like(parameter))
            seconds, mib, checksum = measured(publish, trained, path, dtype)
            found["publish"].append(seconds)
            found["publish MiB"].append(mib)
            seconds, mib, _ = measured(load_weights, sampling, path, checksum)
            found["load"].append(seconds)
            found["load MiB"].append(mib)
        size = path.stat().st_size
    own = dict(sampling.named_parameters())
    assert all(torch.equal(own[name], parameter.to(dtype)) for name, parameter in trained.named_parameters())
    return {name: statistics.median(values) for name, values in found.items()} | {"MB": size / 1e6}


def changed_shares() -> dict[str, dict[str, float]]:
    """Shares of the numbers that differ after an update of AdamW's whose gradients are noise, by precision and rate."""
    shares: dict[str, dict[str, float]] = {}
    for rate in RATES:
        policy = policy_of(None, torch.float32)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(3):  # the third counts: the first moves every weight by the whole rate
            before = [parameter.detach().clone() for parameter in policy.parameters()]
            for parameter in policy.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            differ = sum(
                int((old.to(dtype) != new.detach().to(dtype)).sum())
                for old, new in zip(before, policy.parameters(), strict=True)
            )
            shares.setdefault(name, {})[f"{rate:g}"] = differ / sum(p.numel() for p in policy.parameters())
    return shares


def table(result: dict) -> str:
    columns = ("weights", "MB", "where", "s to publish", "MiB more meanwhile", "s to load", "MiB more meanwhile")
    rows = []
    for kind, places in result["transfers"].items():
        for place, x in places.items():
            numbers = [f"{x['publish']:.2f}", f"{x['publish MiB']:.0f}", f"{x['load']:.2f}", f"{x['load MiB']:.0f}"]
            rows.append([kind, f"{x['MB']:.0f}", place, *numbers])
    return table_of(columns, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/weights.json and the docs")
    options = parser.parse_args()
    transfers = {kind: {place: transfer(kind, place) for place in PLACES} for kind in KINDS}
    result = {"machine": machine(2), "transfers": transfers, "changed": changed_shares()}
    print(json.dumps(result))
    if options.save:
        store(result, "weights", "transfers")
        fill_figures(ROOT / "docs" / "asynchronous.md", table(result), "weights")


if __name__ == "__main__":
    main()
