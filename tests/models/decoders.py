"""A tiny config of each decoder architecture whose sequence classifier is one linear layer at the last token."""

from tests.models.families import FAMILIES, GROUPED, SHARED, tiny_config

SETTINGS = {
    "Qwen2": GROUPED,
    "Gemma": GROUPED | dict(head_dim=8),
    "Gemma2": GROUPED | dict(head_dim=8, sliding_window=64),
    "Phi": GROUPED,
    "Phi3": GROUPED,
    "GPTNeoX": GROUPED,
    "Mixtral": GROUPED | dict(num_local_experts=2),
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "GPTJ": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "GPTBigCode": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "Falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64),
    "Mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
}
DECODERS = (*FAMILIES, *SETTINGS)


def decoder_config(name: str, **overrides):
    import transformers

    if name in FAMILIES:
        return tiny_config(name, **overrides)
    return getattr(transformers, f"{name}Config")(**{**SHARED, **SETTINGS[name], **overrides})
