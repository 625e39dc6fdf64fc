"""The rollout engine on the GPU: transformers' tokens, the model's own log-probs, graphs that change nothing."""

import os
import warnings
from unittest import mock

import numpy as np
import pytest
import torch

from coati.models import Actor
from coati.rollout import GenerationConfig, Request, RolloutEngine
from coati.rollout.engine.graphs import StepGraphs
from tests.models.families import tiny_config

ON_GPU = os.environ.get("COATI_TEST_DEVICE") == "cuda"
FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "bloom", "falcon")[: None if ON_GPU else 2]
COUNT = 60 if ON_GPU else 8  # of prompts
VOCABULARY, EOS = 200, 2


def build(family: str, device, dtype=torch.float32) -> Actor:
    torch.manual_seed(0)
    window = dict(sliding_window=9) if family in ("mistral", "gemma2") else {}
    return (
        Actor(config=tiny_config(family, vocab_size=VOCABULARY, initializer_range=0.2, **window))
        .to(device, dtype)
        .eval()
    )


def prompts(count: int, longest: int = 12) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, VOCABULARY, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def complete(actor, requests, *, graphs=True, slots=64, **options):
    """The completions, and how many CUDA graphs there were for them."""
    config = GenerationConfig(**{"max_new_tokens": 40, **options})
    engine = RolloutEngine(actor, config, eos_ids=[EOS], slots=slots, cuda_graphs=graphs)
    capture, captured = StepGraphs._capture, [0]

    def count(self, step, shape):
        capture(self, step, shape)
        captured.append(len(self.graphs))

    with mock.patch.object(StepGraphs, "_capture", count):
        return engine.generate(requests), max(captured)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_own_with_and_without_graphs(family, device, figure):
    actor, asked = build(family, device), prompts(COUNT)
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt], device=device)
        found = actor.generate(ids, do_sample=False, max_new_tokens=40, eos_token_id=EOS, pad_token_id=0)[
            0, len(prompt) :
        ]
        expected.append(found.tolist())
    for graphs in (True, False):
        for slots in (7, 64):
            found, captured = complete(actor, [Request(p) for p in asked], graphs=graphs, slots=slots, temperature=0.0)
            equal = sum(c.ids == e for c, e in zip(found, expected, strict=True))
            assert equal >= COUNT - 1, (graphs, slots, equal)  # a tie may be rounded the other way
            assert (captured > 0) == (graphs and device.type == "cuda")
            if graphs:
                figure(f"graphs captured for {family}, {slots} slots", captured)


CUT = dict(top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.2, min_new_tokens=5)


@pytest.mark.parametrize("options", [{}, CUT], ids=["plain", "cut"])
def test_log_probs_are_those_of_a_forward_pass(options, device, figure):
    actor, asked = build("llama", device), prompts(COUNT)
    found, _ = complete(actor, [Request(p, i) for i, p in enumerate(asked)], slots=16, temperature=0.8, **options)
    worst = 0.0
    for prompt, completion in zip(asked, found, strict=True):
        ids = torch.tensor([prompt + completion.ids], device=device)
        expected = actor(ids, temperature=0.8)[0, len(prompt) :].detach().cpu()
        worst = max(worst, (torch.tensor(completion.log_probs) - expected).abs().max().item())
    figure("greatest difference of a sampled token's log-prob", worst)
    assert worst < 1e-4


def test_a_sample_depends_on_its_prompt_and_seed(device, figure):
    actor = build("llama", device)
    requests = [Request(p, [3, i]) for i, p in enumerate(prompts(COUNT))]
    alone = [complete(actor, [request])[0][0].ids for request in requests]
    together = [c.ids for c in complete(actor, requests, slots=16)[0]]
    without = [c.ids for c in complete(actor, requests[::-1], graphs=False, slots=5)[0]][::-1]
    figure(
        "samples equal alone and together", f"{sum(a == b for a, b in zip(alone, together, strict=True))} of {COUNT}"
    )
    assert sum(a != b for a, b in zip(alone, together, strict=True)) <= 1
    assert sum(a != b for a, b in zip(alone, without, strict=True)) <= 1


def test_bf16_samples_have_bf16_log_probs(device, figure):
    """What a run in bf16 sees as the mismatch of sampling and training, k3 per token."""
    actor, asked = build("llama", device, torch.bfloat16), prompts(COUNT)
    found, _ = complete(actor, [Request(p, i) for i, p in enumerate(asked)])
    differences = []
    for prompt, completion in zip(asked, found, strict=True):
        expected = actor(torch.tensor([prompt + completion.ids], device=device))[0, len(prompt) :].detach().cpu()
        differences.append(expected - torch.tensor(completion.log_probs))
    difference = torch.cat(differences)
    k3 = (difference.exp() - 1 - difference).mean().item()
    figure("k3 of sampling from training in bf16", k3)
    assert k3 < 0.05


@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_makes_the_host_wait_at_most_once(graphs, device, figure):
    """torch's own count of synchronizing calls, beside the wait for the tokens of the step before."""
    if device.type != "cuda":
        pytest.skip("counts CUDA's synchronizing calls")
    actor = build("llama", device)
    complete(actor, [Request([5, 6, 7], i) for i in range(8)], graphs=graphs)
    config = GenerationConfig(max_new_tokens=64)
    engine = RolloutEngine(actor, config, eos_ids=[], cuda_graphs=graphs)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            engine.generate([Request([5, 6, 7], i) for i in range(8)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.filename).split("/")[-1] + f":{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    figure(f"synchronizing calls in 64 steps{'' if graphs else ' without graphs'}", len(waits))
    print(sorted(set(waits)))
    assert len(waits) <= 64
