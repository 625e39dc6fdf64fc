"""Less memory for long rows, and the same gradients."""

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings
from coati.models.experts import is_experts
from coati.models.long_rows import from_host, split_feed_forward, to_host
from tests.distributed.world import family_config
from tests.models.families import VOCABULARY, padded, rows, tiny_config

LENGTHS = (23, 9, 4)


def outputs_and_gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(*padded(rows(lengths=LENGTHS), "right"), right_padded=True)
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "glm4_moe", "mamba"])
def test_feed_forward_blocks_a_stretch_at_a_time_give_the_same_gradients(family):
    config = tiny_config(family) if family in ("llama", "gpt2", "mamba") else family_config(family, VOCABULARY)
    torch.manual_seed(0)
    model = Actor(config=config).eval()  # without dropout, with gradients
    expected = outputs_and_gradients(model)
    if family == "mamba":
        with pytest.raises(UserError, match=r"feed_forward_tokens: Mamba.* has no blocks named mlp: leave it out"):
            split_feed_forward(model.transformer, 5)
        return
    split_feed_forward(model.transformer, 5)
    widths = []
    for name, part in model.transformer.named_modules():
        if name.endswith(("mlp.up_proj", "mlp.c_fc")):
            part.register_forward_hook(lambda part, inputs, output: widths.append(output.shape[1]))
    found = outputs_and_gradients(model)
    assert set(widths) == {5, 3}, "23 tokens are four times 5, and 3"
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(rows(lengths=(23,))[0][None]), expected[0][:1], rtol=1e-5, atol=1e-6)


def test_experts_see_all_tokens_at_once():
    """They choose by what their router gives for each token, and count them."""
    model = Actor(config=family_config("glm4_moe", VOCABULARY)).eval()
    split_feed_forward(model.transformer, 5)
    seen = []
    for part in model.modules():
        if is_experts(part):
            part.register_forward_pre_hook(lambda part, inputs: seen.append(len(inputs[0])))
    model(*padded(rows(lengths=LENGTHS), "right"), right_padded=True)
    assert seen == [3 * 23] * 2, "of three layers the first is dense"


@pytest.mark.parametrize("model_class", [Actor, Critic])
@pytest.mark.parametrize("lora", [None, LoraSettings(4, dropout=0.3)])
def test_what_waits_on_the_host_comes_back(lora, model_class):
    """Each layer's input, in the order in which it went, and nothing else; dropout is drawn as before."""
    torch.manual_seed(0)
    model = model_class(config=tiny_config("llama"), lora=lora).train()
    model.enable_gradient_checkpointing()
    torch.manual_seed(1)
    expected = outputs_and_gradients(model)
    waiting, kept, given = [], [], []

    def keep(x):
        waiting.append(to_host(x))
        kept.append(tuple(x.shape))
        return len(waiting) - 1

    def give(place: int):
        given.append(place)
        return from_host(waiting[place])

    model.enable_gradient_checkpointing((keep, give))
    torch.manual_seed(1)
    found = outputs_and_gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    layers = model.config.num_hidden_layers
    assert kept == [(3, 23, model.config.hidden_size)] * layers and given == [*reversed(range(layers))]
