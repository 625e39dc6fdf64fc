"""Attention of one new token per row over the KV cache of the slots."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from coati.rollout.engine.cache import SlotCache

ONE_TOKEN = "coati_one_token"


def one_token_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """SDPA for a single query token, where query heads that share a key-value head take the place of tokens: keys and
    values are read once and not repeated.

    Args:
        query: `[rows, heads, 1, head_dim]`.
        key, value: `[rows, key-value heads, width, head_dim]`.
        attention_mask: bool `[rows, 1, 1, width]`.
    """
    rows, heads, _, width = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], width)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, out.shape[-1]), None


def layer_kinds(config) -> list[str]:
    """The kinds of attention that a model's layers have, by transformers' names."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if kinds:
        return kinds
    return ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]


def step_mask(model, cache: SlotCache, tokens: int = 1):
    """The mask of each row's next tokens as transformers models take it: by kind of layer where there are several.

    Models that compute a bias from the mask (ALiBi) get the plain one, `[rows, width]`, of one token; they have no
    windows.
    """
    config = model.transformer.config.get_text_config()
    if not model.takes_positions:
        return cache.visible("full_attention", config)[:, 0]
    kinds = layer_kinds(config)
    seen = {kind: cache.visible(kind, config, tokens) for kind in kinds}
    masks = {kind: _four_dimensional(visible, config, model.transformer.dtype) for kind, visible in seen.items()}
    return masks if len(kinds) > 1 else masks[kinds[0]]


def _four_dimensional(visible: Tensor, config, dtype: torch.dtype) -> Tensor:
    visible = visible[:, None]
    if config._attn_implementation != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


@contextmanager
def step_attention(model) -> Iterator[None]:
    """Inside, models with SDPA (or a kernel that takes no mask) use `one_token_attention`, if they get attention from
    transformers' registry."""
    from transformers import AttentionInterface

    AttentionInterface.register(ONE_TOKEN, one_token_attention)
    config = model.transformer.config
    before = config._attn_implementation
    if before != "eager" and model.takes_positions and model.transformer._supports_attention_backend:
        config._attn_implementation = ONE_TOKEN
    try:
        yield
    finally:
        config._attn_implementation = before
