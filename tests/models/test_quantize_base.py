"""Bases that are quantized when they are loaded: the weights that transformers makes, wherever the adapter goes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.quantized import is_quantized
from tests.distributed.world import family_config
from tests.models.families import VOCABULARY, rows, tiny_config
from tests.models.test_quantized import moved, world_of
from tests.trainers.test_saving import make
from tests.trainers.test_shared_base import four_roles, models_of


def base(folder, family: str = "llama", tokens: int = VOCABULARY, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    Actor(config=family_config(family, tokens)).to(dtype).save_pretrained(folder)
    return str(folder)


def packed(model) -> dict[str, torch.Tensor]:
    """The weights in 4 bits, by their names without adapters."""
    weights = model.transformer.named_parameters() if hasattr(model, "transformer") else model.named_parameters()
    return {
        name.replace(".base_layer", ""): weight.data
        for name, weight in weights
        if getattr(weight, "quant_state", None) is not None
    }


@torch.no_grad()
def test_weights_are_those_that_transformers_makes(tmp_path):
    folder = base(tmp_path)
    ours = Actor(folder, quantize_base=True, dtype=torch.float32)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    expected = packed(theirs)  # before an evaluation, for which bitsandbytes would repack them on some CPUs
    assert len(expected) == 7 * ours.config.num_hidden_layers, "of each layer four of attention, three after it"
    found = packed(ours)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    ids = torch.stack(rows(lengths=(9, 9)))
    logits = theirs.train()(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours(ids)[:, 1:], logits, rtol=0, atol=1e-5)
    exact = Actor(folder, dtype=torch.float32)(ids)
    assert 1e-4 < (ours(ids) - exact).abs().max() < 1, "another model, but a near one"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("model_class", [Actor, RewardModel])
@torch.no_grad()
def test_an_adapter_finds_its_base_as_it_was(model_class, family, tmp_path):
    """Reopened, and merged: gpt2 has transposed layers, qwen3 tied ends, mixtral experts that stay as they are."""
    trained = moved(
        model_class(base(tmp_path / "base", family), quantize_base=True, lora=LoraSettings(4), dtype=torch.float32)
    ).eval()
    assert packed(trained) and any("4 bits" in note for note in trained.notes)
    ids = torch.stack(rows(lengths=(9, 9)))
    expected = trained(ids)
    trained.save_pretrained(tmp_path / "adapter")
    again = model_class(tmp_path / "adapter", dtype=torch.float32).eval()
    assert is_quantized(again.transformer) and torch.equal(again(ids), expected)
    trained.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(model_class(tmp_path / "merged").eval()(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_in_4_bits_do_not_depend_on_the_precision_of_a_run(stored, tmp_path):
    """They are made of the stored ones; what isn't quantized has the dtype that is wanted, and so have products."""
    folder = base(tmp_path / "base", dtype=stored)
    trained = Actor(folder, quantize_base=True, lora=LoraSettings(4), dtype=torch.bfloat16)
    trained.save_pretrained(tmp_path / "adapter")
    again = Actor(tmp_path / "adapter", dtype=torch.float32)
    found, expected = packed(again), packed(trained)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for model, dtype in ((trained, torch.bfloat16), (again, torch.float32)):
        assert {p.dtype for n, p in model.named_parameters() if p.is_floating_point() and "lora_" not in n} == {dtype}
        layers = [layer for layer in model.modules() if getattr(layer, "compute_dtype", None) is not None]
        assert layers and {layer.compute_dtype for layer in layers} == {dtype}


def test_adapters_of_full_bases_and_models_in_a_few_bits_stay_as_they_are(tiny_world, tmp_path):
    folder = base(tmp_path / "base")
    plain = Actor(folder, lora=LoraSettings(4), dtype=torch.float32)
    plain.save_pretrained(tmp_path / "adapter")
    assert not is_quantized(Actor(tmp_path / "adapter").transformer)
    stored = world_of(tiny_world, tmp_path, "fp4")
    expected = packed(Actor(stored, dtype=torch.float32))
    found = packed(Actor(stored, quantize_base=True, dtype=torch.float32))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_layers_that_stay_as_they_are_are_an_error(tmp_path):
    """Falcon's linear layers are a class of their own, which transformers leaves alone without a word."""
    Actor(config=tiny_config("falcon")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FalconForCausalLM has no linear layers that can be quantized"):
        Actor(tmp_path, quantize_base=True)


def test_random_weights_are_refused():
    with pytest.raises(UserError, match="quantize_base needs the folder of a pretrained model"):
        Actor(config=tiny_config("llama"), quantize_base=True)


def plain_base(tiny_world, folder) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    tokenizer.save_pretrained(folder)
    return base(folder, tokens=len(tokenizer))


def test_a_run_needs_adapters(tiny_world, runtime, tmp_path):
    policy = plain_base(tiny_world, tmp_path / "base")
    with pytest.raises(UserError, match=r"are quantized, so they can't be trained: train adapters .*--lora_rank"):
        make("sft", tiny_world, runtime, tmp_path / "run", model=policy, model_config=None, quantize_base="nf4")


def test_a_resumed_run_ends_in_the_same_bits(tiny_world, runtime, tmp_path):
    policy = plain_base(tiny_world, tmp_path / "base")
    how = dict(model=policy, model_config=None, lora_rank=4, steps=4, save_every=2, quantize_base="nf4")
    how |= dict(plugin="zero2", precision="bf16", merge_lora=False, keep_checkpoints=9)
    whole = make("sft", tiny_world, runtime, tmp_path / "whole", **how)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    make("sft", tiny_world, runtime, tmp_path / "rest", **how, resume=str(checkpoint)).train()
    from safetensors.torch import load_file

    expected, found = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = Actor(tmp_path / "rest" / "model", dtype=torch.bfloat16)
    ours, theirs = packed(again), packed(whole.model.module)
    assert theirs and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_four_roles_share_one_base_in_4_bits(tiny_world, runtime, tmp_path, monkeypatch):
    """Policy, critic, reference, and a reward model that was trained so."""
    policy = plain_base(tiny_world, tmp_path / "base")
    how = dict(model=policy, model_config=None, lora_rank=4, quantize_base="nf4", merge_lora=False, steps=1)
    make("reward", tiny_world, runtime, tmp_path / "reward", **how).train()
    adapter = tmp_path / "reward" / "model"
    recorded = json.loads((adapter / "config.json").read_text())["quantization_config"]
    assert recorded["bnb_4bit_quant_type"] == "nf4" and recorded["bnb_4bit_use_double_quant"]
    models = models_of(runtime, monkeypatch)
    changes = dict(model_config=None, quantize_base="nf4")
    four_roles(tiny_world, runtime, tmp_path / "run", policy, str(adapter), **changes).train()
    assert [type(model) for model in models] == [Actor, Critic, RewardModel]
    places = [{weight.data_ptr() for weight in packed(model).values()} for model in models]
    assert places[0] and places[0] == places[1] == places[2]
