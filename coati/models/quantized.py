"""Models whose weights are stored in a few bits, by transformers' quantizers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coati.errors import UserError
from coati.models.quiet import quiet_transformers


def is_quantized(model: nn.Module) -> bool:
    """Whether a transformers model is; its frozen weights can carry adapters, but not be trained."""
    return getattr(model, "hf_quantizer", None) is not None


def nf4():
    """Linear layers in 4 bits as QLoRA has them (2305.14314, section 3): NF4 in blocks of 64 weights whose scales are
    quantized too, 4.13 bits a weight. What transformers' `from_pretrained` takes as `quantization_config`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def wanted_quantization(adapter: str | Path | None, quantize_base: bool):
    """How weights that are stored in full are to be quantized: as when the adapter on them was trained, or by `nf4`.

    Args:
        adapter: its folder, if the model has one; quantize_base: whether `nf4` is wanted where it has no such record.
    """
    recorded = None if adapter is None else recorded_quantization(adapter)
    return nf4() if recorded is None and quantize_base else recorded


def recorded_quantization(folder: str | Path):
    """How the base of an adapter was quantized when the adapter was trained, by the config.json beside it:
    `BitsAndBytesConfig`, or None where it was not."""
    from transformers import BitsAndBytesConfig

    file = Path(folder) / "config.json"
    how = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") if file.is_file() else None
    return BitsAndBytesConfig.from_dict(how) if how and how.get("load_in_4bit") else None


def quantization_note(model: nn.Module) -> str:
    """What a user should know of a model that was quantized when it was loaded.

    Raises:
        UserError: nothing was; some architectures have linear layers of their own.
    """
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    if not packed:
        raise UserError(f"{type(model).__name__} has no linear layers that can be quantized: leave quantize_base out")
    count = sum(p.quant_state.shape.numel() for p in packed)
    others = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in packed)
    return (
        f"{count / 1e6:,.1f} M weights of linear layers are in 4 bits (NF4), {others / 1e6:,.1f} M others stay: "
        "embeddings, output layer, norms, stacked experts"
    )


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
    from transformers.pytorch_utils import Conv1D

    check_mergeable(model)
    transposed = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            # bitsandbytes would give them in the dtype that they were quantized from
            state.dtype = module.compute_dtype or model.dtype
    with quiet_transformers():
        plain = model.dequantize(dtype=model.dtype)
    plain._weight_conversions = None  # those that it was loaded with end in quantized weights, which are gone
    for name in transposed:  # GPT-2's layers, which bitsandbytes has as linear ones
        plain.set_submodule(name, _as_conv1d(plain.get_submodule(name)))
    return plain


def _as_conv1d(linear: Any) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight, layer.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return layer


def prepare_quantized(model: nn.Module, dtype: torch.dtype | None):
    """Makes a quantized model ready for training; any other stays as it is.

    bitsandbytes would repack weights when a CPU first evaluates: that rounds them, and the packed ones have no
    gradient. Transformers leaves what isn't quantized in the stored dtype, for models without a head.

    Args:
        dtype: of what isn't quantized; None for those that the model has.
    """
    if not is_quantized(model):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if isinstance(dtype, torch.dtype) and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
