"""A tiny language model of every architecture that value heads are tested on."""

import torch

from tests.models.families import GROUPED, SHARED, tiny_config

CAUSAL = ("gpt2", "gpt_neox", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi")
SEQ2SEQ = ("t5", "bart", "mbart", "pegasus")
BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
)
OTHERS = {
    "gpt_neox": ("GPTNeoXConfig", {**GROUPED, "num_key_value_heads": 4}),
    "bloom": ("BloomConfig", dict(hidden_size=32, n_layer=2, n_head=4)),
    "qwen2": ("Qwen2Config", GROUPED),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiConfig", GROUPED),
    "t5": ("T5Config", dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)),
    "bart": ("BartConfig", BART),
    "mbart": ("MBartConfig", BART),
    "pegasus": ("PegasusConfig", BART),
}


def config_of(family: str, **overrides):
    import transformers

    if family not in OTHERS:
        return tiny_config(family, **overrides)
    name, settings = OTHERS[family]
    return getattr(transformers, name)(**{**SHARED, **settings, **overrides})


def language_model(family: str, seed: int = 0, **overrides):
    """A transformers model with random weights, in eval mode."""
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if family in SEQ2SEQ else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    return auto.from_config(config_of(family, **overrides)).eval()


def value_head_class(family: str):
    from coati import models

    return models.AutoModelForSeq2SeqLMWithValueHead if family in SEQ2SEQ else models.AutoModelForCausalLMWithValueHead


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Two rows, the second padded; an encoder-decoder gets decoder tokens of another length."""
    ids = torch.tensor([[5, 9, 13, 7, 22, 31], [8, 3, 40, 17, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return batch | ({"decoder_input_ids": torch.tensor([[1, 6, 11, 44], [1, 15, 20, 4]])} if family in SEQ2SEQ else {})
