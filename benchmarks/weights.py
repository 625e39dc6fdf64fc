"""What it takes to hand a policy's weights to a generator: seconds, bytes and memory of each side, for a model of
135 million parameters, whole or as differences; and how many of its numbers an update changes.

python benchmarks/weights.py            # three minutes, 10 GB of memory; one JSON line
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
        rate: learning rate of updates.
    """

    dtype: torch.dtype
    lora: LoraSettings | None = None
    differences: bool = False
    rate: float = 1e-6


RATES = {"1e-6": 1e-6, "1e-5": 1e-5}
KINDS = {"fp32": Kind(torch.float32), "bf16": Kind(torch.bfloat16)}
KINDS |= {f"bf16, differences at {x}": Kind(torch.bfloat16, differences=True, rate=RATES[x]) for x in RATES}
KINDS |= {"fp32, LoRA of rank 16": Kind(torch.float32, LoraSettings(16))}
PLACES = {"disk": None, "/dev/shm": "/dev/shm"}
ROUNDS = 5
RESPONSES, TOKENS = 2, 32  # of an update
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


def updates(policy: Actor, rate: float) -> Iterator[None]:
    """Takes a step of AdamW's whenever it is asked: with policy gradients, of random tokens and advantages."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(SHAPE["vocab_size"], (RESPONSES, TOKENS), generator=generator)
        advantages = torch.randn(RESPONSES, 1, generator=generator)
        (-advantages * policy(ids)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


class Pair:
    """A policy that is trained, and one that samples with its weights."""

    def __init__(self, kind: Kind):
        self.kind = kind
        self.trained, self.sampling = policy_of(kind.lora, torch.float32), policy_of(kind.lora, kind.dtype)
        self.update = updates(self.trained, kind.rate)
        for _ in range(FIRST_UPDATES):
            next(self.update)

    def transfer(self, folder: Path) -> dict[str, float]:
        """Writing a version and loading it; of differences to one that isn't measured, before an update."""
        before, path = folder / "version-0.safetensors", folder / "version-1.safetensors"
        write, loaded = write_weights, ""
        if self.kind.differences:
            write = DifferenceWriter().write
            loaded = self.publish(before, write)
            load_weights(self.sampling, before, loaded)
            next(self.update)
        seconds, mib, checksum = measured(self.publish, path, write)
        found = {"publish": seconds, "publish MiB": mib}
        seconds, mib, _ = measured(load_weights, self.sampling, path, checksum, loaded)
        own = dict(self.sampling.named_parameters())
        for name, parameter in self.trained.named_parameters():
            assert torch.equal(own[name], parameter.to(self.kind.dtype)), name
        return found | {"load": seconds, "load MiB": mib, "MB": path.stat().st_size / 1e6}

    def publish(self, path: Path, write: Callable[[Path, dict], str]) -> str:
        return write(path, weights_of(self.trained, self.trained.state_dict(), self.kind.dtype))


def transfers() -> dict[str, dict[str, dict[str, float]]]:
    """Medians by kind and place, which take turns: whatever else the machine does is the same for all."""
    pairs = {name: Pair(kind) for name, kind in KINDS.items()}
    rounds: dict[str, dict[str, list]] = {name: {place: [] for place in PLACES} for name in KINDS}
    for _ in range(ROUNDS):
        for name, pair in pairs.items():
            for place in PLACES:
                with tempfile.TemporaryDirectory(dir=PLACES[place]) as folder:
                    rounds[name][place].append(pair.transfer(Path(folder)))
    return {name: {place: medians(found) for place, found in places.items()} for name, places in rounds.items()}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def changed_shares() -> dict[str, dict[str, float]]:
    """Shares of the numbers that an update changes, by precision and learning rate."""
    shares: dict[str, dict[str, float]] = {}
    for rate_name, rate in RATES.items():
        policy = policy_of(None, torch.float32)
        update = updates(policy, rate)
        for _ in range(FIRST_UPDATES):
            next(update)
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        next(update)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            differ = sum(
                int((old.to(dtype) != new.detach().to(dtype)).sum())
                for old, new in zip(before, policy.parameters(), strict=True)
            )
            shares.setdefault(name, {})[rate_name] = differ / sum(p.numel() for p in policy.parameters())
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
    result = {"machine": machine(2), "transfers": transfers(), "changed": changed_shares()}
    print(json.dumps(result))
    if options.save:
        store(result, "weights", "transfers")
        fill_figures(ROOT / "docs" / "asynchronous.md", table(result), "weights")


if __name__ == "__main__":
    main()
