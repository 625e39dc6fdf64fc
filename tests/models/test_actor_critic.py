"""Policy and value function on one trunk equal the two apart, and its folders are those of the value-head classes."""

import pytest
import torch

from coati.models import Actor, ActorCritic, AutoModelForCausalLMWithValueHead, LoraSettings
from coati.models.base import disable_dropout
from tests.models.families import FAMILIES, padded, rows, tiny_config


def make(family: str, **options) -> ActorCritic:
    torch.manual_seed(0)
    model = ActorCritic(config=tiny_config(family), **options)
    disable_dropout(model)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_gives_what_policy_and_head_give(family, side):
    model = make(family)
    ids, mask = padded(rows(), side)
    log_probs, entropy, values = model(ids, mask, temperature=0.7, with_entropy=True)
    alone = Actor(model.model)(ids, mask, temperature=0.7, with_entropy=True)
    torch.testing.assert_close((log_probs, entropy), alone)
    hidden = model.model(
        ids,
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        output_hidden_states=True,
    ).hidden_states[-1]
    expected = (hidden @ model.v_head.summary.weight.T + model.v_head.summary.bias).squeeze(-1)
    torch.testing.assert_close(values[mask], expected[mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_value_only_leaves_the_trunk_alone(family):
    model = make(family)
    _, values = model(*padded(rows(), "right"), value_only=True)
    values.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "v_head.summary.weight",
        "v_head.summary.bias",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_its_folder_is_a_value_head_folder_and_the_other_way_round(family, tmp_path):
    model, (ids, mask) = make(family), padded(rows(), "right")
    expected = model(ids, mask)[1]
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(ids, attention_mask=mask.long())[2][mask], expected[mask])
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = ActorCritic(tmp_path / "theirs")
    disable_dropout(again)
    torch.testing.assert_close(again(ids, mask), model(ids, mask))


def test_a_live_value_head_model_shares_its_weights():
    from transformers import AutoModelForCausalLM

    value_head = AutoModelForCausalLMWithValueHead(AutoModelForCausalLM.from_config(tiny_config("llama")))
    model = ActorCritic(value_head)
    assert model.v_head is value_head.v_head and model.model is value_head.pretrained_model


def test_an_adapter_s_folder_keeps_the_head(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    model = ActorCritic(tmp_path / "base", lora=LoraSettings(rank=2))
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "v_head" in name:
                parameter.normal_(std=0.1)
    disable_dropout(model)
    ids, mask = padded(rows(), "right")
    expected = model(ids, mask)
    for merge in (False, True):
        model.save_pretrained(tmp_path / f"merge {merge}", merge=merge)
        again = ActorCritic(tmp_path / f"merge {merge}")
        disable_dropout(again)
        torch.testing.assert_close(again(ids, mask), expected)
    without = model(ids, mask, adapter=False)[0]
    torch.testing.assert_close(without, Actor(tmp_path / "base").eval()(ids, mask))
