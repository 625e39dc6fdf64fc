"""Models whose weights are stored in a few bits, by transformers' quantizers."""

import torch
from torch import nn

from coati.errors import UserError
from coati.models.quiet import quiet_transformers


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model is; its frozen weights can carry adapters, but not be trained."""
    return getattr(model, "hf_quantizer", None) is not None


def check_mergeable(model: nn.Module):
    """Raises for a transformers model into whose weights adapters can't be merged.

    Raises:
        UserError: a quantization that transformers can't undo.
    """
    from transformers.quantizers.base import HfQuantizer

    if is_quantized(model) and type(model.hf_quantizer)._dequantize is HfQuantizer._dequantize:
        method = model.hf_quantizer.quantization_config.quant_method
        raise UserError(
            f"adapters can't be merged into weights that are quantized by {getattr(method, 'value', method)}: "
            "--merge_lora False, or a model in full precision"
        )


def dequantize(model: nn.Module) -> nn.Module:
    """A quantized transformers model with plain weights in its own dtype: those that it computes with. Consumes the
    model."""
    check_mergeable(model)
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            # bitsandbytes would give them in the dtype that they were quantized from
            state.dtype = module.compute_dtype or model.dtype
    with quiet_transformers():
        plain = model.dequantize(dtype=model.dtype)
    plain._weight_conversions = None  # those that it was loaded with end in quantized weights, which are gone
    return plain


def prepare_quantized(model: nn.Module, dtype: torch.dtype | None):
    """Makes a quantized model ready for training; any other stays as it is.

    bitsandbytes would repack weights when a CPU first evaluates: that rounds them, and the packed ones have no
    gradient. Transformers leaves what isn't quantized in the stored dtype, for models without a head.
    """
    if not is_quantized(model):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if isinstance(dtype, torch.dtype) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
