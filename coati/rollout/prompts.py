"""Token ids around generation: EOS, the text of a response, padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coati.transfer import upload


def eos_ids(tokenizer, model) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
    generation = getattr(model.transformer, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more} - {None})


def response_texts(tokenizer, rows: Sequence[Sequence[int]], ends: Sequence[int] = ()) -> list[str]:
    """The text of sampled ids for rewards, samples and reports: all but EOS, padding and the `ends` of `eos_ids`.

    Other special tokens carry content: `<think>`, or the marks of a tool's call, are often added as such.
    """
    without = {tokenizer.eos_token_id, tokenizer.pad_token_id, *ends}
    return tokenizer.batch_decode([[i for i in row if i not in without] for row in rows], skip_special_tokens=False)


def response_text(tokenizer, ids: Sequence[int], ends: Sequence[int] = ()) -> str:
    """`response_texts` of one row."""
    return response_texts(tokenizer, [ids], ends)[0]


def suppressed_ids(model) -> list[int]:
    """Tokens that are never sampled, by the model's generation config: rows that only pad its vocabulary."""
    return getattr(getattr(model.transformer, "generation_config", None), "suppress_tokens", None) or []


def pad_left(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, seq]` with padding on the left, and the mask of real tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: list[list[int]], device: torch.device, repeat: bool = False) -> Tensor:
    """Token ids `[batch, seq]` with 0, or the row's last token, on the right."""
    longest = max(len(row) for row in rows)
    return upload([row + [row[-1] if repeat else 0] * (longest - len(row)) for row in rows], device)
