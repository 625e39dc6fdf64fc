"""Matrix products of a few rows on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

FEWEST, MOST = 9, 48


@contextmanager
def small_batch_matmul(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a CPU model in fp32 multiply 9 to 48 rows as `(W x^T)^T`.

    MKL's `x W^T` on several threads takes as long for 10 rows as for 64; transposed it takes half of that. See
    docs/performance.md.
    """
    layers = [layer for layer in model.modules() if _gains(layer)] if torch.get_num_threads() > 1 else []
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _gains(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if not FEWEST <= rows <= MOST:
        return nn.functional.linear(x, layer.weight, layer.bias)
    # attention's quick kernels take rows that lie together only
    product = (layer.weight @ x.reshape(rows, -1).t()).t().contiguous().reshape(*x.shape[:-1], -1)
    return product if layer.bias is None else product + layer.bias
