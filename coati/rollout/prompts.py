"""Token ids around generation: what ends a response, and prompts that end together."""

import torch
from torch import Tensor


def eos_ids(tokenizer, model) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
    generation = getattr(model.transformer, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more} - {None})


def never_ids(model) -> list[int]:
    """Tokens that are never sampled, by the model's generation config: rows that only fill its vocabulary up."""
    return getattr(getattr(model.transformer, "generation_config", None), "suppress_tokens", None) or []


def pad_left(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, seq]` with padding on the left, and the mask of real tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask
