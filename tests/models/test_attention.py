"""Which attention a model runs: what transformers supports for it, and never one that leaves a part out."""

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, AutoModelForCausalLMWithValueHead, RewardModel
from coati.models.attention import soft_cap
from coati.parallel.sequence import use_sequence_parallel_attention
from coati.rewards import SequenceClassifierReward
from tests.models.families import GROUPED, SHARED, padded, rows, tiny_config

CAP = dict(attn_logit_softcapping=0.5, query_pre_attn_scalar=1)
CAPPED = ("Gemma2", "VaultGemma")


def config_of(kind: str, **overrides):
    """Of a family whose attention's scores can be capped."""
    import transformers

    settings = {**SHARED, **GROUPED, "head_dim": 8, **CAP, "initializer_range": 0.5}  # scores far above the cap
    return getattr(transformers, f"{kind}Config")(**{**settings, **overrides})


def attention_of(model) -> str:
    return model.transformer.config._attn_implementation


@pytest.mark.parametrize("kind", CAPPED)
@torch.no_grad()
def test_capped_scores_are_capped_by_default(kind, tmp_path):
    """REPORT 5: of a config and of a folder, under every class; the cap makes a difference here."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    actor, ids = Actor(config=config_of(kind)).eval(), torch.stack(rows(lengths=(7, 7)))
    actor.save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    expected = eager(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    uncapped = Actor(tmp_path, config=config_of(kind, attn_logit_softcapping=None)).eval()
    assert attention_of(uncapped) == ("sdpa" if uncapped.transformer._supports_sdpa else "eager")
    assert (uncapped(ids)[:, 1:] - expected).abs().max() > 0.05
    for found in (actor, Actor(tmp_path), Actor(tmp_path, attn_implementation="auto")):
        assert attention_of(found) == "eager"
        torch.testing.assert_close(found.eval()(ids)[:, 1:], expected, rtol=1e-5, atol=1e-5)
    assert attention_of(RewardModel(tmp_path)) == "eager"
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert policy.pretrained_model.config._attn_implementation == "eager"


def test_other_classifiers_are_capped_too(tmp_path, tiny_world):
    """REPORT 5: a reward that is somebody's Gemma 2."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    config = config_of("Gemma2", num_labels=1, vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    reward = SequenceClassifierReward(str(tmp_path), tokenizer)
    assert reward.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "bloom", "mistral"])
def test_auto_is_what_the_model_supports(family, tmp_path):
    """REPORT 5: sdpa, or eager where a model has no other."""
    model = Actor(config=tiny_config(family))
    assert attention_of(model) == ("sdpa" if model.transformer._supports_sdpa else "eager")
    model.save_pretrained(tmp_path)
    assert attention_of(Actor(tmp_path, attn_implementation="auto")) == attention_of(model)


def test_a_model_without_sdpa_runs(tmp_path):
    """REPORT 5: gpt-oss has attention sinks, which sdpa doesn't know."""
    from transformers import GptOssConfig

    config = GptOssConfig(**{**SHARED, **GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1})
    model = Actor(config=config).eval()
    assert attention_of(model) == "eager"
    assert model(*padded(rows(), "right")).isfinite().all()
    with pytest.raises(UserError, match="can't be split: sdpa doesn't support its attention"):
        use_sequence_parallel_attention(model.transformer, None)


def test_sdpa_is_refused_where_scores_are_capped(tmp_path):
    """REPORT 5: in one line, before any work; so are split sequences, whose attention is sdpa."""
    config = config_of("Gemma2")
    with pytest.raises(UserError, match=r"gemma2 caps them at 0\.5: leave attn_implementation at auto"):
        Actor(config=config, attn_implementation="sdpa")
    model = Actor(config=config)
    model.save_pretrained(tmp_path)
    # some releases of transformers have no sdpa for it at all
    with pytest.raises(UserError, match=r"caps them at 0\.5|does not support .*scaled_dot_product_attention"):
        Actor(tmp_path, attn_implementation="sdpa")
    with pytest.raises(UserError, match="gemma2 can't be split"):
        use_sequence_parallel_attention(model.transformer, None)


def test_a_cap_is_found_in_the_parts_of_a_config():
    """REPORT 5: an encoder-decoder has one for each side."""
    from transformers import T5GemmaConfig, T5GemmaModuleConfig

    sides = [T5GemmaModuleConfig(attn_logit_softcapping=cap) for cap in (None, 30.0)]
    assert soft_cap(T5GemmaConfig(encoder=sides[0], decoder=sides[1])) == 30.0
    assert soft_cap(tiny_config("llama")) is None
