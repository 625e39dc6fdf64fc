"""Models in a few bits: adapters train on them, and a merged export is what was trained."""

import json

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, LoraSettings, RewardModel
from coati.models.quantized import is_quantized
from coati.trainers.factory import Factory
from tests.conftest import settings_for, trainer_classes
from tests.models.families import rows, tiny_config
from tests.trainers.test_saving import make

QUANTIZATIONS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32"),
    "nested": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8 bits": dict(load_in_8bit=True),
}


def quantized(folder, kind: str, **sizes) -> str:
    """As people publish them: quantized from bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    Actor(config=tiny_config("llama", hidden_size=64, intermediate_size=128, **sizes)).save_pretrained(folder / "base")
    config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": torch.float32} | QUANTIZATIONS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder / kind)
    return str(folder / kind)


@torch.no_grad()
def moved(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("model_class", [Actor, RewardModel])
@torch.no_grad()
def test_the_merged_export_is_the_model_that_was_trained(model_class, kind, tmp_path):
    """REPORT 17: dequantized, then added to; peft alone would round to 4 bits again, and transformers can't save it."""
    model = moved(model_class(quantized(tmp_path, kind), lora=LoraSettings(4), dtype=torch.float32)).eval()
    assert is_quantized(model.transformer)
    ids = torch.stack(rows(lengths=(9, 9)))
    expected = model(ids)
    model.try_saving(tmp_path / "tried", merge=True)
    model.save_pretrained(tmp_path / "merged", merge=True)
    assert torch.equal(model(ids), expected)
    again = model_class(tmp_path / "merged").eval()
    assert not is_quantized(again.transformer)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    # bitsandbytes rounds what 8-bit layers read, too
    torch.testing.assert_close(again(ids), expected, rtol=0, atol=2e-2 if kind == "8 bits" else 1e-5)


def test_sampling_leaves_the_weights_to_training(tmp_path):
    """REPORT 17: on some CPUs bitsandbytes packs weights at the first evaluation, rounded and without gradients."""
    actor = moved(Actor(quantized(tmp_path, "nf4"), lora=LoraSettings(4), dtype=torch.float32))
    ids = torch.stack(rows(lengths=(9, 9)))

    def gradients() -> list[torch.Tensor]:
        actor.zero_grad()
        actor.train()(ids).sum().backward()
        return [p.grad.clone() for p in actor.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        sampled = actor.eval()(ids)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(), strict=True))
    torch.testing.assert_close(actor.train()(ids), sampled, rtol=0, atol=1e-5)


def world_of(tiny_world, folder, kind: str) -> str:
    """A quantized policy for the tiny world's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    place = quantized(folder, kind, vocab_size=len(tokenizer), max_position_embeddings=128)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("plugin", ["ddp", "zero2"])
def test_a_run_trains_adapters_and_exports_them_merged(plugin, tiny_world, runtime, tmp_path):
    """REPORT 17."""
    from transformers import AutoModelForCausalLM

    policy = world_of(tiny_world, tmp_path, "nf4")
    trainer = make(
        "sft",
        tiny_world,
        runtime,
        tmp_path / "run",
        model=policy,
        model_config=None,
        lora_rank=4,
        steps=2,
        plugin=plugin,
    )
    trainer.train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert plain.dtype == torch.bfloat16, "that of the model whose weights were quantized"
    assert not any("4bit" in type(module).__name__ for module in plain.modules())


def test_full_training_of_quantized_weights_is_refused_at_the_start(tiny_world, runtime, tmp_path):
    """REPORT 17: they have no gradients, and could not be saved."""
    policy = world_of(tiny_world, tmp_path, "nf4")
    with pytest.raises(UserError, match=r"nf4 are quantized, so they can't be trained: train adapters .*--lora_rank"):
        make("sft", tiny_world, runtime, tmp_path / "run", model=policy, model_config=None)


@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel", "sequence_parallel"])
def test_quantized_weights_are_not_split(split, tiny_world, runtime, tmp_path):
    policy = world_of(tiny_world, tmp_path, "nf4")
    config_class, _ = trainer_classes("sft")
    changes = dict(model=policy, model_config=None, lora_rank=4) | {split: 2}
    config = configure(config_class, **settings_for("sft", tiny_world, output_dir=str(tmp_path / "run"), **changes))
    with pytest.raises(UserError, match=r"nf4 are quantized, which doesn.t combine .*: use --plugin zero2"):
        Factory(config, runtime, learns_responses=True).model(Actor, policy, lora=config.model.lora)


def test_a_quantization_that_can_not_be_undone_is_refused_at_the_start(tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 17: where transformers has no way back, adapters are exported alone."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    policy = world_of(tiny_world, tmp_path, "nf4")
    monkeypatch.setattr(Bnb4BitHfQuantizer, "_dequantize", HfQuantizer._dequantize)
    changes = dict(model=policy, model_config=None, lora_rank=4, steps=1)
    trainer = make("sft", tiny_world, runtime, tmp_path / "run", **changes)
    with pytest.raises(UserError, match="quantized by bitsandbytes: --merge_lora False"):
        trainer.train()
    assert trainer.steps_done == 0
    make("sft", tiny_world, runtime, tmp_path / "alone", **changes, merge_lora=False).train()
