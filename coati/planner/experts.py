"""Mixtures of experts without data: which tokens go to which expert is not known, how many products are computed is."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from transformers.integrations import moe


class _GroupedProduct(torch.autograd.Function):
    """What transformers' product of tokens `[tokens, in]` with their experts' weights `[experts, in, out]` makes and
    keeps for the backward pass."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return tokens.new_empty(len(tokens), weight.shape[-1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weight = ctx.saved_tensors
        return torch.empty_like(tokens), torch.empty_like(weight)


@contextmanager
def products_without_data() -> Iterator[None]:
    """Inside, experts compute nothing, and give outputs of the right shapes."""

    def product(tokens: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return _GroupedProduct.apply(tokens.to(weight.dtype), weight)

    with mock.patch.object(moe, "_grouped_mm", product):
        yield
