"""Conversations of several turns: coati's engine with and without keys and values kept, and vLLM with its prefix cache.

    python benchmarks/turns.py                # minutes on two idle cores; one JSON line
    python benchmarks/turns.py --save         # and writes benchmarks/results/turns.json

32 conversations begin with 64 tokens; each turn samples 16 and reads 48 new ones. All of a turn are answered before the
next one begins, as in episodes. The model is that of generation.py. Rates are sampled tokens a second; `read` is how
many prompt tokens the model read, over the fewest possible. vLLM takes part where there is a .venv-vllm.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import Contender, contest, machine, ratio, serve, store
from benchmarks.generation import VLLM, make_model

CONVERSATIONS, BEGINNING, RESPONSE, NEW = 32, 64, 16, 48
TURNS = (1, 2, 4, 8, 16)


def new_tokens(turns: int) -> np.ndarray:
    """What is read in each turn of each conversation after the first, int64 `[turns, conversations, NEW]`."""
    return np.random.default_rng(2).integers(3, 1000, (turns, CONVERSATIONS, NEW))


def beginnings() -> list[list[int]]:
    return np.random.default_rng(1).integers(3, 1000, (CONVERSATIONS, BEGINNING)).tolist()


def prepare_coati(settings: dict):
    from coati.models import Actor
    from coati.rollout import GenerationConfig, Request, RolloutEngine

    actor, turns = Actor(make_model(settings)), settings["turns"]
    config = GenerationConfig(max_new_tokens=RESPONSE + 1)

    def ends(responses: list[list[int]]) -> list[bool]:
        return [len(ids) == RESPONSE for ids in responses]

    def work() -> dict:
        keeps = settings["keeps"]
        requests = [Request(prompt, [i, 0], keep_states=keeps) for i, prompt in enumerate(beginnings())]
        read = 0
        for turn, new in enumerate(new_tokens(turns).tolist()):
            engine = RolloutEngine(actor, config, eos_ids=[], stop=ends)
            completions = engine.generate(requests)
            read += engine.reader.prompt_tokens
            requests = [
                Request([*request.prompt, *done.ids, *new[i]], [i, turn + 1], states=done.states, keep_states=keeps)
                for i, (request, done) in enumerate(zip(requests, completions, strict=True))
            ]
        return {"amount": turns * CONVERSATIONS * RESPONSE, "parts": {"read": read / CONVERSATIONS}}

    return work


def prepare_vllm(settings: dict):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    turns = settings["turns"]
    with tempfile.TemporaryDirectory() as folder:
        make_model(settings).save_pretrained(folder)
        options = dict(dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=True)
        llm = LLM(folder, kv_cache_memory_bytes=2**30, **options)
    parameters = SamplingParams(max_tokens=RESPONSE, ignore_eos=True, logprobs=0, detokenize=False)

    def work() -> int:
        llm.reset_prefix_cache()
        prompts = beginnings()
        for new in new_tokens(turns).tolist():
            found = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
            prompts = [[*p, *o.outputs[0].token_ids, *n] for p, o, n in zip(prompts, found, new, strict=True)]
        return turns * CONVERSATIONS * RESPONSE

    return work


PREPARE = {"coati": prepare_coati, "vLLM": prepare_vllm}


def run_case(turns: int, rounds: int, threads: int) -> dict:
    command, script = [sys.executable], [str(Path(__file__).resolve()), "worker"]
    settings = {"turns": turns, "contender": "coati"}
    contenders = [
        Contender("coati", command + script, settings | {"keeps": True}),
        Contender("coati, reading again", command + script, settings | {"keeps": False}),
    ]
    if VLLM.exists():
        contenders.append(Contender("vLLM", [str(VLLM), *script], settings | {"contender": "vLLM"}))
    found = contest(contenders, rounds=rounds, threads=threads)
    least = BEGINNING + (turns - 1) * NEW
    return {
        "contenders": found,
        "ratios": {name: ratio(found["coati"], other) for name, other in found.items()},
        "read": {name: other["parts"]["read"] / least for name, other in found.items() if other["parts"]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, nargs="+", default=list(TURNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/turns.json")
    options = parser.parse_args()
    result = {"machine": machine(options.threads), "rounds": options.rounds, "cases": {}}
    for turns in options.turns:
        result["cases"][str(turns)] = run_case(turns, options.rounds, options.threads)
        print(turns, "turns done", file=sys.stderr, flush=True)
        if options.save:
            store(result, "turns", "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        serve(lambda settings: PREPARE[settings["contender"]](settings))
    else:
        main()
