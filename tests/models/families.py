"""One tiny config a model family, and batches with padding."""

import torch

VOCABULARY, PAD, EOS = 61, 0, 2
FAMILIES = ("llama", "qwen3", "gpt2", "opt", "mistral")
SHARED = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS)
GROUPED = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny_config(family: str, **overrides):
    """Llama, Qwen3 and Mistral with grouped-query attention; OPT whose output width is not its hidden size; dropout
    as in the published models."""
    import transformers

    if family == "gpt2":
        settings = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2Config(**{**SHARED, **settings, **overrides})
    if family == "opt":
        settings = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
        return transformers.OPTConfig(**{**SHARED, **settings, "max_position_embeddings": 64, **overrides})
    if family == "qwen3":
        return transformers.Qwen3Config(**{**SHARED, **GROUPED, "head_dim": 8, **overrides})
    if family == "mistral":
        return transformers.MistralConfig(**{**SHARED, **GROUPED, "sliding_window": None, **overrides})
    if family == "gemma2":
        return transformers.Gemma2Config(**{**SHARED, **GROUPED, "head_dim": 8, **overrides})
    if family == "bloom":  # no positions: ALiBi
        return transformers.BloomConfig(**{**SHARED, "hidden_size": 32, "n_layer": 2, "n_head": 4, **overrides})
    if family == "gptj":  # an output layer with a bias
        settings = dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
        return transformers.GPTJConfig(**{**SHARED, **settings, **overrides})
    if family == "falcon":
        settings = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        return transformers.FalconConfig(**{**SHARED, **settings, **overrides})
    if family == "mamba":
        return transformers.MambaConfig(**{**SHARED, "hidden_size": 32, "num_hidden_layers": 2, **overrides})
    return transformers.LlamaConfig(**{**SHARED, **GROUPED, **overrides})


NOT_SPLIT = ("bloom", "falcon", "gemma2", "mamba")  # examples of what tensor and pipeline parallelism don't describe


def model_of(model_class, family: str = "llama", **how):
    """Of any architecture of the tests, without dropout; its weights tell tokens apart."""
    from tests.distributed.world import family_config

    torch.manual_seed(0)
    config = tiny_config(family) if family in NOT_SPLIT else family_config(family, VOCABULARY)
    model = model_class(config=config, **how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rows(seed: int = 0, lengths=(7, 4, 1)) -> list[torch.Tensor]:
    """Token ids without PAD and EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(tokens: list[torch.Tensor], side: str, extra: int = 0, fill: int = PAD):
    """`input_ids`, `attention_mask` `[batch, longest + extra]`."""
    width = max(len(x) for x in tokens) + extra
    ids = torch.full((len(tokens), width), fill)
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for i, x in enumerate(tokens):
        place = slice(0, len(x)) if side == "right" else slice(width - len(x), width)
        ids[i, place], mask[i, place] = x, True
    return ids, mask
