"""What it takes to hand a policy's weights to a generator: seconds, bytes and memory of each side, for a model of
135 million parameters, whole or as differences; and how many of its numbers an update changes.

python benchmarks/weights.py            # four minutes; one JSON line
python benchmarks/weights.py --save     # and writes results/weights.json and docs/asynchronous.md's table
"""

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from coati.models import Actor, LoraSettings  # noqa: E402
from coati.rollout.remote import DifferenceWriter, load_weights  # noqa: E402
from coati.rollout.remote.weights import weights_of, write_weights  # noqa: E402
from examples.stages import fill_figures, table_of  # noqa: E402

# SmolLM2-135M's
SHAPE = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
SHAPE |= dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)


@dataclass(frozen=True)
class Kind:
    """Weights that travel.

    Attributes:
        dtype: that they are sampled with; they are trained in float32.
        rate: learning rate of the update between two versions, which travel as differences; None: they travel whole.
    """

    dtype: torch.dtype
    lora: LoraSettings | None = None
    rate: float | None = None


RATES = (1e-6, 1e-5)
KINDS = {"fp32": Kind(torch.float32), "bf16": Kind(torch.bfloat16)}
KINDS |= {f"bf16, differences at a learning rate of {rate:g}": Kind(torch.bfloat16, rate=rate) for rate in RATES}
KINDS |= {"fp32, LoRA of rank 16": Kind(torch.float32, LoraSettings(16))}
PLACES = {"disk": None, "/dev/shm": "/dev/shm"}
ROUNDS = 5
RESPONSES, TOKENS = 2, 64  # of an update
FIRST_UPDATES = 2  # that don't count: AdamW's first moves every weight by the whole learning rate


def policy_of(lora: LoraSettings | None, dtype: torch.dtype) -> Actor:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    return Actor(config=LlamaConfig(**SHAPE), lora=lora, dtype=dtype).eval()


def measured(function: Callable[..., Any], *arguments: object) -> tuple[float, float, Any]:
    """Seconds that a call takes, by how many MiB this process was larger meanwhile, and what it returns."""
    ctypes.CDLL(None).malloc_trim(0)  # what an update has freed would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = memory("VmRSS"), time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, memory("VmHWM") - before, result


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def updates(policy: Actor, rate: float | None) -> Iterator[None]:
    """Moves all that trains, each time by noise or by a step of AdamW's with policy gradients, of random tokens and
    advantages."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate or 0.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    while True:
        if rate is None:
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(1e-3 * torch.randn_like(parameter))
        else:
            ids = torch.randint(SHAPE["vocab_size"], (RESPONSES, TOKENS), generator=generator)
            advantages = torch.randn(RESPONSES, 1, generator=generator)
            (-advantages * policy(ids)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


def publish(policy: Actor, path: Path, dtype: torch.dtype, write: Callable[[Path, dict], str]) -> str:
    return write(path, weights_of(policy, policy.state_dict(), dtype))


def transfer(name: str, place: str) -> dict[str, float]:
    """Medians of writing and loading a version; of differences from one that isn't measured."""
    kind = KINDS[name]
    trained, sampling = policy_of(kind.lora, torch.float32), policy_of(kind.lora, kind.dtype)
    found: dict[str, list[float]] = {"publish": [], "publish MiB": [], "load": [], "load MiB": [], "MB": []}
    steps = updates(trained, kind.rate)
    for _ in range(FIRST_UPDATES):
        next(steps)
    with tempfile.TemporaryDirectory(dir=PLACES[place]) as folder:
        before, path = Path(folder) / "before.safetensors", Path(folder) / "version.safetensors"
        for _ in range(ROUNDS):
            write, loaded = write_weights, ""
            if kind.rate is not None:
                write = DifferenceWriter().write
                loaded = publish(trained, before, kind.dtype, write)
                load_weights(sampling, before, loaded)
            next(steps)
            seconds, mib, checksum = measured(publish, trained, path, kind.dtype, write)
            found["publish"].append(seconds)
            found["publish MiB"].append(mib)
            seconds, mib, _ = measured(load_weights, sampling, path, checksum, loaded)
            found["load"].append(seconds)
            found["load MiB"].append(mib)
            found["MB"].append(path.stat().st_size / 1e6)
    own = dict(sampling.named_parameters())
    assert all(torch.equal(own[name], parameter.to(kind.dtype)) for name, parameter in trained.named_parameters())
    return {name: statistics.median(values) for name, values in found.items()}


def changed_shares() -> dict[str, dict[str, float]]:
    """Shares of the numbers that an update changes, by precision and learning rate."""
    shares: dict[str, dict[str, float]] = {}
    for rate in RATES:
        policy = policy_of(None, torch.float32)
        steps = updates(policy, rate)
        for _ in range(FIRST_UPDATES):
            next(steps)
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        next(steps)
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
