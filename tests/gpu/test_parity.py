"""Log-probs, values, rewards, losses and gradients on the GPU beside float64 on the CPU."""

import pytest
import torch

from coati.losses import cross_entropy, gae, kl_divergence, pairwise_reward_loss, policy_loss, value_loss, whiten
from coati.models import Actor, Critic, RewardModel
from tests.gpu.conftest import relative_error
from tests.models.families import padded, tiny_config

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "mistral")
# of log-probs and gradients; bf16 keeps 8 bits, and errors of a model's layers add up
BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (3e-2, 2e-1)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(model_class, family: str):
    """A model in float64 on the CPU, with logits of standard deviation near 2, and rows of its vocabulary."""
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"
    window = dict(sliding_window=9) if family == "mistral" else {}  # eager's far padding is no number in float64
    config = tiny_config(family, vocab_size=500, initializer_range=0.1, **window)
    model = model_class(config=config, attn_implementation=attention).double()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 500, (n,), generator=generator) for n in (40, 33, 7, 1, 40, 12)]
    return model.eval(), *padded(rows, "right")


def outputs_and_gradients(model, inputs, weigh):
    model.zero_grad()
    output = model(**inputs)
    (output * weigh).sum().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", [Actor, Critic, RewardModel])
def test_a_model_is_what_it_is_in_float64(model_class, family, precision, device, figure):
    model, ids, mask = build(model_class, family)
    real = mask.double()[:, 0] if model_class is RewardModel else mask.double()
    weigh = real * torch.randn(real.shape, generator=torch.Generator().manual_seed(2)).double()
    inputs = dict(input_ids=ids, attention_mask=mask)
    expected, gradient = outputs_and_gradients(model, inputs, weigh)
    model.to(device, DTYPES[precision])
    for options in ({}, {"right_padded": True}):
        on_device = {name: x.to(device) for name, x in inputs.items()}
        found, found_gradient = outputs_and_gradients(model, on_device | options, weigh.to(device, torch.float32))
        errors = relative_error(found.cpu() * real, expected * real), relative_error(found_gradient, gradient)
        name = f"{model_class.__name__} {family} {precision}{' no mask' if options else ''}"
        figure(f"error of {name}", [float(f"{error:.2g}") for error in errors])
        assert errors[0] < BOUNDS[precision][0] and errors[1] < BOUNDS[precision][1]


@pytest.mark.parametrize("members", [2, 4])
def test_shared_prompts_are_separate_rows(members, device, figure):
    model, ids, mask = build(Actor, "llama")
    ids[1::2] = ids[::2]
    ids, mask = ids[:4].clone(), mask[:4].clone()
    ids[:, :5] = ids[0, :5]
    mask[:, :5] = True
    model.to(device, torch.float32)
    inputs = dict(input_ids=ids.to(device), attention_mask=mask.to(device))
    together, apart = model(**inputs, shared_prefix_group=members), model(**inputs)
    real = inputs["attention_mask"]
    figure("error of shared prompts", relative_error(together * real, apart * real))
    torch.testing.assert_close(together[real], apart[real], rtol=1e-4, atol=1e-4)
    if device.type == "cuda":
        weigh = torch.randn(real.shape, generator=torch.Generator().manual_seed(2)).to(device) * real
        _, expected = outputs_and_gradients(model, inputs, weigh)
        model.model.set_attn_implementation("flex_attention")
        by_blocks, gradient = outputs_and_gradients(model, inputs | {"shared_prefix_group": members}, weigh)
        errors = relative_error(by_blocks * real, apart * real), relative_error(gradient, expected)
        figure("error of shared prompts with a mask by blocks", [float(f"{error:.2g}") for error in errors])
        assert errors[0] < 1e-3 and errors[1] < 1e-2  # TF32 in its kernels


def test_losses_are_what_they_are_on_the_host(device):
    """Pure functions of tensors: the same numbers wherever they lie."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 6, 50, generator=generator)
    mask = torch.rand(6, 50, generator=generator) > 0.3
    calls = {
        "policy": lambda a, b, c, d, mask: policy_loss(a, b, c, mask, 100.0, clip_low=0.2, clip_high=0.2)[0],
        "value": lambda a, b, c, d, mask: value_loss(a, b, c, mask, 100.0, clip=0.2)[0],
        "gae": lambda a, b, c, d, mask: torch.stack(gae(a, b, mask, 0.99, 0.95)),
        "kl": lambda a, b, c, d, mask: kl_divergence(a, b, mask, "k3"),
        "whiten": lambda a, b, c, d, mask: whiten(a, mask, 0.1, 1.3),
        "cross entropy": lambda a, b, c, d, mask: cross_entropy(a, mask, 100.0)[0],
        "pairwise": lambda a, b, c, d, mask: pairwise_reward_loss(a[:, 0], b[:, 0], 6.0)[0],
    }
    for name, call in calls.items():
        expected, found = call(a, b, c, d, mask), call(*(x.to(device) for x in (a, b, c, d, mask)))
        assert found.device.type == device.type, name
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5, msg=name)
