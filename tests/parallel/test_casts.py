"""Under ddp and bf16, autocast casts weights: once per forward pass that trains, never once per token."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coati.models import Actor
from coati.models.lora import LoraSettings
from coati.parallel import PluginConfig
from coati.parallel.factory import make_engine
from coati.rollout import GenerationConfig, Request, RolloutEngine
from tests.models.families import tiny_config


class WeightCasts(TorchDispatchMode):
    """Counts casts of weights to bf16, by name."""

    def __init__(self, module):
        self.names = {p.data_ptr(): name for name, p in module.named_parameters()}
        self.casts = Counter()
        super().__init__()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **keywords or {})
        is_cast = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_cast and isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
            source = arguments[0] if operation is torch.ops.aten._to_copy.default else arguments[1]
            if source.dtype == torch.float32 and source.data_ptr() in self.names:
                self.casts[self.names[source.data_ptr()]] += 1
        return result


def engine(runtime, optimizer, lora=None):
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=50)
    return make_engine(Actor(config=config, lora=lora), PluginConfig(precision="bf16"), runtime, optimizer=optimizer)


def casts_of_generation(engine, tokens: int) -> Counter:
    with engine.full() as module, WeightCasts(module) as counter:
        sampling = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens)
        RolloutEngine(module, sampling, eos_ids=[2]).generate([Request([5, 6, 7]), Request([8])])
    return counter.casts


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "lora"])
def test_a_policy_that_trains_casts_each_weight_once_per_rollout(lora, runtime):
    policy = engine(runtime, {}, lora)
    short, long = casts_of_generation(policy, 3), casts_of_generation(policy, 12)
    trained = {name for name, p in policy.module.named_parameters() if p.requires_grad and p.ndim > 1}
    assert short == long and max(long.values()) == 1
    assert set(long) <= trained and len(long) >= len(trained) - 1  # embeddings are looked up as they are


def test_a_frozen_model_casts_none(runtime):
    reference = engine(runtime, None)
    assert not casts_of_generation(reference, 6)
    with WeightCasts(reference.module) as counter:
        reference(input_ids=torch.tensor([[5, 6, 7]]))
    assert not counter.casts


def test_the_frozen_weights_beside_an_adapter_are_not_cast(runtime):
    policy = engine(runtime, {}, LoraSettings(rank=2))
    with WeightCasts(policy.module) as counter:
        policy(input_ids=torch.tensor([[5, 6, 7]])).sum().backward()
    assert counter.casts and all("lora_" in name for name in counter.casts)


def test_training_casts_each_weight_once_per_forward_pass(runtime):
    policy = engine(runtime, {})
    with WeightCasts(policy.module) as counter:
        policy(input_ids=torch.tensor([[5, 6, 7]])).sum().backward()
    assert counter.casts and max(counter.casts.values()) == 1
