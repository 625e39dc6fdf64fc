"""Generation: coati's rollout engine beside `transformers.generate` and, where there is a .venv-vllm, vLLM.

    python benchmarks/generation.py                # all cases, minutes on two idle cores; one JSON line
    python benchmarks/generation.py --save         # and writes benchmarks/results/generation.json
    python benchmarks/generation.py --cases fixed-32-64 --rounds 1

A case is fixed-BATCH-NEW (responses of exactly NEW tokens) or log-normal (128 prompts, lengths of mean 58 and at most
256, the same for all; `generate` is given several batch sizes, and its best counts). Prompts have 32 tokens. The model
is a random Llama of 5.8 M parameters in fp32; both sample at temperature 1 and keep log-probs. Ours comes as it is and
with `compile_generation` (compiled before the clock runs; left out where there is no g++). vLLM runs eager, as behind
`rollout_engine: vllm`, but without seeds and without a weight sync. Ratios are to transformers.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import Contender, contest, machine, serve, store

PROMPT = 32
CASES = ("fixed-32-64", "fixed-128-64", "fixed-32-128", "fixed-128-128", "log-normal")
OURS = {"coati": False, "coati, compiled": True}
VLLM = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"
BATCH_SIZES = (16, 32, 64)
MODEL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=2048)


def limits_of(case: str) -> list[int]:
    """Tokens of each response."""
    if case != "log-normal":
        batch, new = map(int, case.split("-")[1:])
        return [new] * batch
    return np.clip(log_normal(128, 58, 0.8), 1, 256).tolist()


def log_normal(count: int, mean: float, sigma: float) -> np.ndarray:
    """Lengths with that mean, int64 `[count]`."""
    return np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count).round().astype(int)


def make_model(settings: dict):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if settings.get("base"):
        return AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32).eval()
    device = torch.device(settings.get("device", "cpu"))
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **MODEL | settings.get("model", {})))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def prompts(count: int) -> list[list[int]]:
    return np.random.default_rng(1).integers(3, 1000, (count, PROMPT)).tolist()


def prepare_coati(settings: dict):
    return work_of_coati(make_model(settings), settings["case"], compiled=settings["compiled"])


def work_of_coati(model, case: str, compiled: bool = False, **options):
    from coati.models import Actor
    from coati.rollout import GenerationConfig, Request, RolloutEngine

    actor, limits = Actor(model), limits_of(case)
    config = GenerationConfig(max_new_tokens=max(limits), compile_generation=compiled)
    engine = RolloutEngine(actor, config, eos_ids=[], **options)
    requests = [Request(p, i, n) for i, (p, n) in enumerate(zip(prompts(len(limits)), limits, strict=True))]
    return lambda: sum(len(completion.ids) for completion in engine.generate(requests))


def prepare_transformers(settings: dict):
    return work_of_transformers(make_model(settings), settings["case"], settings["batch_size"])


def work_of_transformers(model, case: str, size: int):
    """Batches in the order of arrival; each goes on until its longest row has ended."""
    import torch

    limits = limits_of(case)
    model.generation_config.pad_token_id = 0
    ids = torch.tensor(prompts(len(limits)), device=model.device)

    @torch.no_grad()
    def work() -> int:
        for start in range(0, len(limits), size):
            batch = ids[start : start + size]
            new = max(limits[start : start + size])
            keywords = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0)
            kept = model.generate(batch, return_dict_in_generate=True, output_logits=True, **keywords)
            tokens = kept.sequences[:, batch.shape[1] :]
            for position, logits in enumerate(kept.logits):
                logits.log_softmax(-1).gather(1, tokens[:, position : position + 1])
        return sum(limits)

    return work


def prepare_vllm(settings: dict):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    limits = limits_of(settings["case"])
    with tempfile.TemporaryDirectory() as folder:
        make_model(settings).save_pretrained(folder)
        options = dict(dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False)
        llm = LLM(folder, kv_cache_memory_bytes=2**31, **options)
    batch = [{"prompt_token_ids": prompt} for prompt in prompts(len(limits))]
    parameters = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False) for n in limits]

    def work() -> int:
        found = llm.generate(batch, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in found)

    return work


PREPARE = {"coati": prepare_coati, "transformers": prepare_transformers, "vLLM": prepare_vllm}


def contenders(
    case: str, model: dict, sizes: Sequence[int], device: str = "cpu", base: Path | None = None
) -> list[Contender]:
    """coati, transformers with several batch sizes, vLLM; of a random Llama, or of the model in the folder `base`."""
    command = [sys.executable, str(Path(__file__).resolve()), "worker"]
    settings = dict(case=case, model=model, device=device, base=str(base) if base else None)
    found = [
        Contender(name, command, settings | dict(contender="coati", compiled=compiled))
        for name, compiled in OURS.items()
        if not compiled or shutil.which("g++")
    ]
    for size in sizes:
        of_peer = settings | dict(contender="transformers", batch_size=size)
        found.append(Contender(f"transformers, batch {size}", command, of_peer))
    if VLLM.exists() and not model and device == "cpu":  # it doesn't run models of any shape
        found.append(Contender("vLLM", [str(VLLM), *command[1:]], settings | dict(contender="vLLM")))
    return found


def run_case(
    case: str,
    rounds: int,
    threads: int,
    model: dict,
    base: Path | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict:
    """Args: batch_sizes: those that transformers is given where lengths differ."""
    rows = len(limits_of(case))
    sizes = [size for size in batch_sizes if size <= rows] if case == "log-normal" else [rows]
    found = contest(contenders(case, model, sizes, base=base), rounds=rounds, threads=threads)
    best = max(result["rate"] for name, result in found.items() if name.startswith("transformers"))
    ratios = {name: found[name]["rate"] / best for name in found if not name.startswith("transformers")}
    return {"ratios": ratios, "contenders": found}


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "worker":
        return serve(lambda settings: PREPARE[settings["contender"]](settings))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=json.loads, default={}, help="changes of the Llama's configuration, as JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/generation.json")
    options = parser.parse_args()
    result = {
        "machine": machine(options.threads),
        "rounds": options.rounds,
        "unit": "tokens/s",
        "model": MODEL | options.model,
        "cases": {},
    }
    for case in options.cases:
        found = result["cases"][case] = run_case(case, options.rounds, options.threads, options.model)
        print(case, {k: round(v, 2) for k, v in found["ratios"].items()}, file=sys.stderr, flush=True)
        if options.save:
            store(result, "generation", "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
