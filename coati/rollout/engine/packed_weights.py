"""Weights as a CPU's matrix products read them best."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

SMALLEST = 100_000  # weights of a layer: with fewer, a call of oneDNN costs what its product gains
MOST_BYTES = 4 * 2**30  # of all copies: whoever has a larger model may not have the memory for them


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a CPU model multiply with copies of their weights that oneDNN has packed, in fp32
    and bf16, where products of a few rows take up to three times as long with the weights as they are: see
    docs/performance.md. The copies take as much memory as the weights, and packing as long as some ten steps of a row.
    Models whose copies would take more than 4 GiB stay as they are.

    What is written to the weights inside is not seen. Nothing here has a gradient.
    """
    layers = [layer for layer in model.modules() if _gains(layer)]
    if sum(layer.weight.numel() * _computes_in(layer).itemsize for layer in layers) > MOST_BYTES:
        layers = []
    for layer in layers:
        layer.forward = MethodType(_forward_with(_packed(layer)), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _gains(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer.weight.device.type != "cpu":
        return False
    return layer.weight.numel() >= SMALLEST and _can_pack(_computes_in(layer))


def _computes_in(layer: nn.Linear) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype


def _can_pack(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _packed(layer: nn.Linear) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(_computes_in(layer)), None)


def _forward_with(packed: Tensor):
    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, bias, "none", [], "")

    return forward
