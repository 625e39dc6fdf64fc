"""On a GPU: how much of the matrix rate training uses, and of the memory bandwidth decoding, both measured here.

    python benchmarks/gpu.py --save                    # 20 minutes on an H200; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --shapes 0.5B --parts decode

Random Llamas in bf16. Contenders work one after the other, each alone on the device: in training coati, TRL 1.16 (where
`make trl` made its environment) and a plain PyTorch loop; in decoding coati with and without CUDA graphs, and
`transformers.generate`.

MFU is (6 P + 6 layers x hidden x length) FLOPs a token (PaLM, 2204.02311, appendix B, for causal attention) over the
rate of a square matrix product; P counts all weights but the input embeddings, and the 8B shape trains with 8 of its
32 layers, as its optimizer states would not fit. Decoding reads all weights and the keys and values of all rows at
each step; its share is those bytes per second over the bandwidth of a copy.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import generation, training
from benchmarks.contest import machine, store

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    name: dict(zip((*SIZES, "vocab_size"), numbers, strict=True))
    for name, numbers in {
        "tiny": (32, 64, 2, 2, 2, 1024),
        "0.5B": (896, 4864, 24, 14, 2, 151936),
        "8B": (4096, 14336, 32, 32, 8, 128256),
    }.items()
}
TRAINED_LAYERS = 8  # at most
LENGTH = {"tiny": 64, "0.5B": 2048, "8B": 2048}
DECODED = ("fixed-1-128", "fixed-16-128", "fixed-64-128", "fixed-256-128", "log-normal")
PARTS = ("sft", "reward", "decode")


def rates(device: str) -> dict[str, float]:
    """FLOPs a second of a bf16 matrix product, and bytes a second of a copy (read and written)."""
    import torch

    size = 8192 if device == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b, source = a.clone(), torch.zeros(size * size * 16, device=device, dtype=torch.bfloat16)
    target = source.clone()
    return {
        "flops": 2 * size**3 / seconds(lambda: a @ b, device),
        "bandwidth": 2 * source.nbytes / seconds(lambda: target.copy_(source), device),
    }


def seconds(work, device: str, repeats: int = 20) -> float:
    """The time of one call, after some to warm up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - started) / repeats


def weights(shape: dict, *, embeddings: bool, head: bool) -> int:
    """Parameters of a Llama of that shape."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    kept = shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = 2 * hidden * hidden * (1 + kept) + 3 * hidden * shape["intermediate_size"]
    return int(layers * layer + (embeddings + head) * hidden * shape["vocab_size"])


def train(algorithm: str, name: str, options, measured: dict) -> dict:
    """Tokens a second, MFU and peak memory of every contender."""
    shape, length = SHAPES[name], LENGTH[name]
    shape = shape | {"num_hidden_layers": min(shape["num_hidden_layers"], TRAINED_LAYERS)} if name == "8B" else shape
    flags = {"plugin": "zero2", "precision": "bf16"} if options.device == "cuda" else {}
    rows = 16 if algorithm == "sft" else 8
    peers = {"TRL, padded" if algorithm == "sft" else "TRL": {}} if options.peers else {}
    case = training.Case(algorithm, rows, rows // 4, 2, [length] * 64, flags, peers, loop=options.peers)
    found = training.run_case(case, options.rounds, options.threads, shape, options.device)["contenders"]
    of_weights = 6 * weights(shape, embeddings=False, head=algorithm == "sft")
    flops = of_weights + 6 * shape["num_hidden_layers"] * shape["hidden_size"] * length
    return {who: result | {"mfu": result["rate"] * flops / measured["flops"]} for who, result in found.items()}


def decode(cases: list[str], name: str, options, measured: dict) -> dict[str, dict]:
    """By case: tokens a second of coati (with and without CUDA graphs) and of `transformers.generate`, and the share of
    the bandwidth that they use. All in this process, one after the other, on one model."""
    import torch

    shape = SHAPES[name]
    model = generation.make_model({"device": options.device, "model": shape})
    heads = shape["num_key_value_heads"] / shape["num_attention_heads"]
    token = 2 * 2 * shape["num_hidden_layers"] * shape["hidden_size"] * heads  # keys and values, two bytes each
    found: dict[str, dict] = {}
    for case in cases:
        limits = generation.limits_of(case)
        context = generation.PROMPT + sum(limits) / len(limits) / 2
        step = 2 * weights(shape, embeddings=False, head=True) + len(limits) * context * token
        contenders = {
            "coati": lambda case=case: generation.work_of_coati(model, case),
            "coati, no graphs": lambda case=case: generation.work_of_coati(model, case, cuda_graphs=False),
        }
        sizes = (64, 128) if case == "log-normal" else (len(limits),)
        for size in sizes if options.peers else ():
            of_peer = lambda case=case, size=size: generation.work_of_transformers(model, case, size)  # noqa: E731
            contenders[f"transformers, batch {size}"] = of_peer
        found[case] = {}
        for who, prepare in contenders.items():
            work, turns = prepare(), []
            work()  # to warm up, and to capture graphs
            for _ in range(options.rounds):
                if options.device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
                amount = work()
                turns.append(amount / (time.perf_counter() - started))
            result = found[case][who] = {"rate": statistics.median(turns), "rates": turns}
            if options.device == "cuda":
                result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            if case != "log-normal":  # where the number of rows doesn't stay
                result["bandwidth_share"] = result["rate"] / len(limits) * step / measured["bandwidth"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["0.5B", "8B"], choices=list(SHAPES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cases", nargs="+", default=list(DECODED), help="of decoding, see generation.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="coati alone")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json")
    options = parser.parse_args()
    measured = rates(options.device)
    result = {"machine": machine(options.threads) | device_name(options.device), "rounds": options.rounds, "found": {}}
    result["measured"] = measured
    for name in options.shapes:
        for part in options.parts:
            if part == "decode":
                found = decode(options.cases, name, options, measured)
            else:
                found = {part: train(part, name, options, measured)}
            for case, of_case in found.items():
                result["found"][f"{name} {case}"] = of_case
                tell(f"{name} {case}", of_case)
            if options.save:
                store(result, "gpu", "found")
    print(json.dumps(result))


def tell(name: str, found: dict[str, dict]):
    """One line a contender; where the checks collect figures, there too."""
    figures = os.environ.get("COATI_GPU_FIGURES")
    for who, result in found.items():
        told = {"rate": round(result["rate"])}
        told |= {key: round(result[key], 3) for key in ("mfu", "bandwidth_share") if key in result}
        print(f"{name}, {who}: {told}", file=sys.stderr, flush=True)
        if figures:
            with open(figures, "a") as file:
                file.write(json.dumps({"name": f"{name}, {who}", "value": told}) + "\n")


def device_name(device: str) -> dict[str, str]:
    import torch

    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


if __name__ == "__main__":
    main()
