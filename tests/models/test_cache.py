"""The cache goes by the name that the installed transformers has for it."""

import warnings

import pytest
import torch

from coati.models import Actor, AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from coati.models.cache import cache_name
from coati.rollout import GenerationConfig, Request, RolloutEngine
from tests.models.families import tiny_config
from tests.models.language_models import batch_of, config_of, language_model

FAMILIES = ("llama", "qwen3", "gpt2", "opt", "mistral", "bloom", "falcon", "gptj", "gemma2")
PROMPTS = [[5, 9, 13], [7, 22, 31, 8, 3]]


def generate(actor: Actor) -> list[list[int]]:
    engine = RolloutEngine(actor.eval(), GenerationConfig(max_new_tokens=4, temperature=0), eos_ids=[])
    return [completion.ids for completion in engine.generate([Request(prompt) for prompt in PROMPTS])]


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_warns_of_nothing(family):
    """REPORT 32: transformers says that it will take a name away long before it does."""
    torch.manual_seed(0)
    actor = Actor(config=tiny_config(family))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(actor)
        actor.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_value_head_models_warn_of_nothing(family):
    """REPORT 32: with a cache and without; its users go on calling it by TRL's name."""
    is_seq2seq = family in ("t5", "bart")
    model_class = AutoModelForSeq2SeqLMWithValueHead if is_seq2seq else AutoModelForCausalLMWithValueHead
    model, batch = model_class(language_model(family)).eval(), batch_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, cache = model(**batch, return_past_key_values=True)
        assert cache is not None
        rest = {"decoder_input_ids" if is_seq2seq else "input_ids": torch.tensor([[7], [9]])}
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        assert model(
            **{**batch, "attention_mask": batch["attention_mask"] if is_seq2seq else mask, **rest},
            past_key_values=cache,
        )


def test_a_model_that_knows_the_new_name_only_gets_it(monkeypatch):
    """REPORT 32: whatever the installed release."""
    import transformers

    torch.manual_seed(0)
    expected = generate(Actor(config=config_of("llama")))
    own, before = transformers.LlamaForCausalLM.forward, cache_name(transformers.LlamaForCausalLM)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, logits_to_keep=0, **options):
        assert "past_key_values" not in options
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return own(self, **inputs, logits_to_keep=logits_to_keep, **{before: cache}, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    torch.manual_seed(0)
    assert generate(Actor(config=config_of("llama"))) == expected
