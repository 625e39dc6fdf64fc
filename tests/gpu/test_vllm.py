"""vLLM as the rollout engine on a GPU, where it is installed."""

from importlib.util import find_spec

import pytest
import torch

from coati.models import Actor
from coati.rollout import GenerationConfig, Request
from tests.models.families import tiny_config

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def test_log_probs_are_those_of_a_forward_pass(device, figure):
    from coati.rollout.vllm import VLLMEngine

    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    actor = Actor(config=tiny_config("llama", vocab_size=500, **sizes)).to(device).eval()
    engine = VLLMEngine(actor, GenerationConfig(max_new_tokens=20, temperature=0.8), eos_ids=[2])
    worst = 0.0
    requests = [Request([5 + i, 6, 7], i) for i in range(8)]
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        ids = torch.tensor([[*request.prompt, *completion.ids]], device=device)
        expected = actor(ids, temperature=0.8)[0, 3:].detach().cpu()
        worst = max(worst, (torch.tensor(completion.log_probs) - expected).abs().max().item())
    figure("vLLM: greatest difference of a sampled token's log-prob", worst)
    assert worst < 1e-3
