"""Models of text and images: coati reads texts, trains the language model, and leaves what reads images as it is."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.towers import has_towers
from coati.rollout import GenerationConfig, Request, RolloutEngine
from tests.conftest import settings_for, trainer_classes
from tests.models.families import padded, rows

TEXT = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
TEXT |= dict(num_hidden_layers=2, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=2)
VISION = dict(hidden_size=32, intermediate_size=48)
BATCH = padded(rows(), "right")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory) -> Path:
    """A Gemma 3 with a vision tower, which transformers loads whole as a causal language model."""
    vision = VISION | dict(num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    tokens = dict(image_token_index=399, boi_token_index=398, eoi_token_index=397, mm_tokens_per_image=4)
    config = transformers.Gemma3Config(text_config=TEXT | dict(sliding_window=8), vision_config=vision, **tokens)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma3")
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def qwen(name: str, folder: Path, **text) -> Path:
    """A Qwen with a vision tower, whose causal language model has none."""
    config, model = (getattr(transformers, f"{name}{what}") for what in ("Config", "ForConditionalGeneration"))
    vision = VISION | dict(depth=1, num_heads=2, out_hidden_size=32)
    model(config(text_config=TEXT | text, vision_config=vision)).save_pretrained(folder)
    return folder


def images(folder: Path) -> dict[str, torch.Tensor]:
    """What a stored Gemma 3 has beside its language model."""
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder)
    names = ("model.vision_tower.", "model.multi_modal_projector.")
    found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(names)}
    assert len(found) > 10
    return found


@pytest.mark.parametrize("wrapper", [Actor, Critic, RewardModel])
def test_the_language_model_alone_trains_and_it_is_said(wrapper, gemma3):
    model = wrapper(gemma3).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if re.search("vision_tower|projector", name)}
    assert frozen and re.search("vision_tower, .*multi_modal_projector stay as they are", model.notes[-1])
    model(*BATCH).sum().backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert learned and all(p.grad is not None for p in learned)


def test_padding_on_either_side_changes_nothing(gemma3):
    actor, tokens = Actor(gemma3).eval(), rows()
    for side in ("left", "right"):
        ids, mask = padded(tokens, side, extra=2)
        log_probs = actor(ids, mask)
        for row, x in enumerate(tokens):
            expected = actor.transformer(x[None]).logits[0].log_softmax(-1)[torch.arange(len(x) - 1), x[1:]]
            torch.testing.assert_close(log_probs[row, mask[row].nonzero()[1:, 0]], expected, rtol=1e-4, atol=1e-5)


def test_the_engine_samples_from_it(gemma3):
    """Past its window of 8 tokens; log-probs are those of a forward pass."""
    actor = Actor(gemma3).eval()
    requests = [Request(row.tolist(), i) for i, row in enumerate(rows())]
    completions = RolloutEngine(actor, GenerationConfig(max_new_tokens=12), eos_ids=[]).generate(requests)
    for request, found in zip(requests, completions, strict=True):
        tokens = torch.tensor([[*request.prompt, *found.ids]])
        torch.testing.assert_close(actor(tokens)[0, -12:], torch.tensor(found.log_probs), rtol=1e-4, atol=1e-5)


def test_adapters_leave_towers_alone_and_go_on_a_trunk(gemma3, tmp_path):
    actor = Actor(gemma3, lora=LoraSettings(rank=2))
    adapted = [name for name, p in actor.named_parameters() if p.requires_grad]
    assert adapted and not [name for name in adapted if re.search("vision_tower|projector", name)]
    actor.save_pretrained(tmp_path / "adapter")
    critic = Critic(tmp_path / "adapter")
    assert sum("lora_" in name for name, _ in critic.named_parameters()) == len(adapted)


@pytest.mark.parametrize("changes", [dict(plugin="zero2"), dict(plugin="ddp", lora_rank=2)], ids=str)
def test_weight_decay_leaves_towers_as_they_were(changes, gemma3, tiny_world, runtime, tmp_path):
    """And what is saved reads images as before, in plain transformers."""
    config_class, trainer_class = trainer_classes("sft")
    settings = settings_for("sft", tiny_world, model=str(gemma3), model_config=None, output_dir=str(tmp_path / "run"))
    settings |= dict(steps=2, weight_decay=0.5, save_every=0) | changes
    trainer_class(configure(config_class, **settings), runtime).train()
    before, after = images(gemma3), images(tmp_path / "run" / "model")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    first, last = (transformers.AutoModelForCausalLM.from_pretrained(x) for x in (gemma3, tmp_path / "run" / "model"))
    assert not torch.equal(first.lm_head.weight, last.lm_head.weight) or "lora_rank" in changes


def test_ppo_trains_one(gemma3, tiny_world, runtime, tmp_path):
    config_class, trainer_class = trainer_classes("ppo")
    settings = settings_for("ppo", tiny_world, model=str(gemma3), output_dir=str(tmp_path / "run"))
    settings |= dict(steps=1, temperature=1.0)
    trainer_class(configure(config_class, **settings), runtime).train()
    before, after = images(gemma3), images(tmp_path / "run" / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_where_transformers_loads_the_language_model_alone_it_is_said(tmp_path):
    kinds = dict(
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    folder = qwen("Qwen3_5", tmp_path / "qwen", **kinds)
    actor = Actor(folder).eval()
    assert actor.notes == ["of this qwen3_5 the language model alone is loaded, and saved: it reads texts only"]
    both = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(folder).eval()
    torch.testing.assert_close(actor.transformer(BATCH[0]).logits, both(BATCH[0]).logits)
    actor.save_pretrained(tmp_path / "saved")
    assert Actor(tmp_path / "saved").notes == []


def test_what_is_no_causal_language_model_is_refused_in_words(tmp_path):
    folder = qwen("Qwen2_5_VL", tmp_path / "qwen")
    for source in (dict(pretrained=folder), dict(config=transformers.AutoConfig.from_pretrained(folder))):
        with pytest.raises(UserError, match="is no language model that transformers' AutoModelForCausalLM knows"):
            Actor(**source)


@pytest.mark.parametrize("wrapper", [Actor, RewardModel])
def test_a_language_model_whose_config_has_parts_trains_whole(wrapper):
    mpt = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=32)
    assert all(p.requires_grad for p in wrapper(config=mpt).parameters())
    assert mpt.sub_configs and not any(has_towers(config) for config in (transformers.DbrxConfig(), mpt))
