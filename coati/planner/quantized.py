"""Linear layers of bitsandbytes without weights: what they keep, and what their products need for a moment."""

import math
from typing import Any

import torch
from torch import Tensor, nn

BITS_OF_SCALES = 32 / 64  # of a weight: one float for each block of 64
BITS_OF_QUANTIZED_SCALES = 8 / 64 + 32 / (64 * 256)  # a byte for each block, a float for each 256 of these


def bits_per_weight(quantization: Any) -> float:
    """What bitsandbytes stores of a weight of a linear layer, scales included.

    Args:
        quantization: transformers' `BitsAndBytesConfig`, or the same as it stands in a config.json.
    """
    how = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if not how.get("load_in_4bit"):
        return 8
    return 4 + (BITS_OF_QUANTIZED_SCALES if how.get("bnb_4bit_use_double_quant") else BITS_OF_SCALES)


class PackedLinear(nn.Module):
    """As bitsandbytes' linear layers: both passes unpack the weight for as long as its product takes.

    Args:
        linear: the layer that it replaces, on the meta device; or transformers' Conv1D.
    """

    def __init__(self, linear: Any, bits: float):
        super().__init__()
        into, out = linear.weight.shape if hasattr(linear, "nf") else linear.weight.shape[::-1]
        self.in_features, self.out_features, self.bias = into, out, linear.bias
        stored = torch.empty(math.ceil(into * out * bits / 8), dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ gradient.new_empty(ctx.shape), None


def pack_linear_layers(transformer: nn.Module, bits: float):
    """Replaces the layers that transformers quantizes when it loads a model: all linear ones but the output layer.

    Args:
        transformer: on the meta device, inside its adapters if it has some.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(transformer, None, transformer._keep_in_fp32_modules)
    for name, layer in list(transformer.named_modules()):
        own_name = name.removesuffix(".base_layer")
        is_linear = isinstance(layer, Conv1D) or type(layer) is nn.Linear
        if is_linear and ".lora_" not in name and should_convert_module(own_name, kept):
            transformer.set_submodule(name, PackedLinear(layer, bits))
