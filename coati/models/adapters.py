"""Adapters that peft wrote: put on a model, compared with what is trained, and added to its weights."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.quantized import dequantize, is_quantized

PREFIX = "base_model.model."  # of every name in an adapter's file
LANGUAGE_MODEL_HEADS = ("lm_head", "embed_out", "output_projection")


def load_adapter(
    model: nn.Module, source: str | Path, is_trainable: bool = True, **hub
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Loads a saved adapter onto its base model, whatever the adapter was trained on: the model without a head, or one
    with the head of a language model or of a sequence classifier. Where it was trained with more tokens than `model`
    has, the embeddings get their number.

    Args:
        model: a transformers model. Without a head, it has no use for what the adapter holds of a language model's.
        source: folder or hub name of the adapter.
        **hub: token, revision, cache_dir, subfolder, ...

    Returns:
        The model with its adapter; and where the adapter brings a classifier's head that the model lacks, `score`, its
        weight.

    Raises:
        UserError: prompt or prefix tuning; tensors that the model lacks, or that are not in the file; sizes
            that don't fit.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = PeftConfig.from_pretrained(str(source), **hub)
    if config.is_prompt_learning:
        raise UserError(
            f"{source} is an adapter of {config.peft_type.value}, which adds tokens: give one of LoRA's kind"
        )
    config.inference_mode = not is_trainable
    stored, heads = _names_for(model, load_peft_weights(str(source), device="cpu", **hub))
    score = {name.removeprefix("score."): heads[name] for name in heads if name in ("score.weight", "score.bias")}
    others = [name for name in heads if name.partition(".")[0] not in LANGUAGE_MODEL_HEADS]
    others = [name for name in others if name.removeprefix("score.") not in score]
    if _is_trunk(model):
        _aim_at_trunk(config, model)
    prefixes = _embedding_prefixes(model)
    _resize_embeddings(model, prefixes, stored, config, source)
    wrap = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    kind = type(model).__name__
    try:
        adapted = wrap(model, config)
        result = set_peft_model_state_dict(adapted, stored)
    except KeyError as error:
        raise UserError(
            f"the adapter in {source} lacks {error.args[0]}, which its adapter_config.json asks for"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the adapter in {source} doesn't fit {kind}: {str(error).splitlines()[-1].strip()}") from error
    state = adapted.state_dict(keep_vars=True)
    found = {id(state[name]) for name in state if name not in result.missing_keys}  # tied ones have another name
    wanted = {id(tensor) for tensor in adapter_state(adapted).values()} - found
    missing = [name for name in result.missing_keys if id(state[name]) in wanted]
    if missing:
        raise UserError(f"the adapter in {source} lacks {len(missing)} tensors that {kind} needs: {missing[0]}")
    unexpected = [name for name in result.unexpected_keys if not _is_twice(stored, name, prefixes)] + others
    if unexpected:
        raise UserError(
            f"the adapter in {source} holds {len(unexpected)} tensors that {kind} has no place for "
            f"({unexpected[0].removeprefix(PREFIX)}): merge it into the model that it was trained on, and give that"
        )
    if not is_trainable:
        adapted.eval()
    return adapted, score


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What a folder of a peft model's adapter holds, by the names there: the model's own parameters."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True), save_embedding_layers=False)


def unsaved(model: nn.Module) -> list[str]:
    """Trained parameters of a peft model that its saved adapter would lack."""
    saved = {id(tensor) for tensor in adapter_state(model).values()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def has_more_tokens(model: nn.Module) -> bool:
    """Whether a peft model's embeddings have another number of rows than those of the base that its adapter names, so
    that the adapter's folder must hold them."""
    from transformers import AutoConfig

    base = model.peft_config[model.active_adapters[0]].base_model_name_or_path
    if not base:
        return False
    try:
        stored = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
        return stored.vocab_size != vocabulary(model.get_base_model())
    except (OSError, ValueError):  # the base model no longer exists
        return True


def merged(model: nn.Module, state: dict[str, Tensor] | None = None) -> nn.Module:
    """A copy of a peft model's transformers model with the adapters added to the weights, exactly: those of a quantized
    model are dequantized first and stay so; embeddings and output layer are untied if an adapter
    changes only one of them. The copy is in the host's memory, as a GPU may have no room for it; on "meta" if the model
    is.

    Args:
        state: the weights of a model that is on "meta" itself.

    Raises:
        UserError: a quantization that can't be undone.
    """
    is_meta = next(model.parameters()).is_meta
    if is_quantized(model.get_base_model()):
        model_copy = _dequantized(copy.deepcopy(model))
    else:
        model_copy = copied_to(model, "meta" if is_meta else "cpu")
    if is_meta and state is not None:
        own = {name: tensor.clone() for name, tensor in state.items()}  # merging changes them in place
        model_copy.load_state_dict(own, assign=True)
        model_copy.get_base_model().tie_weights()
    _untie(model_copy.get_base_model())
    plain = model_copy.merge_and_unload()
    rows, columns = plain.get_input_embeddings(), plain.get_output_embeddings()
    if columns is not None and rows.weight is not columns.weight:
        plain.config.get_text_config().tie_word_embeddings = plain.config.tie_word_embeddings = False
    return plain


def copied_to(model: nn.Module, device: str) -> nn.Module:
    """A copy on another device; on "meta" it has shapes but no data. Tied weights stay tied."""
    # deepcopy takes what the memo holds for already copied
    memo: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        copied = tensor.detach().to(device, copy=True)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(model, memo)


def vocabulary(model: nn.Module) -> int:
    """Rows of a transformers model's input embeddings, inside any adapter."""
    return model.get_input_embeddings().weight.shape[0]


def _dequantized(model: nn.Module) -> nn.Module:
    """A quantized peft model on plain weights. Consumes the model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config, state = model.peft_config["default"], get_peft_model_state_dict(model, save_embedding_layers=False)
    again = type(model)(dequantize(model.unload()), config)
    set_peft_model_state_dict(again, state)
    return again


def _untie(base: nn.Module):
    """Gives the output layer a weight of its own where it shares the embeddings' and an adapter changes either: what
    is added to one would be added to both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    rows, columns = base.get_input_embeddings(), base.get_output_embeddings()
    if columns is None or isinstance(columns, AuxiliaryTrainingWrapper):  # the latter is a copy already
        return
    if isinstance(rows, BaseTunerLayer) or isinstance(columns, BaseTunerLayer):
        inner = columns.get_base_layer() if isinstance(columns, BaseTunerLayer) else columns
        inner.weight = nn.Parameter(inner.weight.detach().clone(), inner.weight.requires_grad)


def _embedding_prefixes(model: nn.Module) -> list[str]:
    """How the names of an adapter's tensors for the embeddings begin; and for the output layer, if there is one."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [PREFIX + names[id(layer)] + "." for layer in layers if layer is not None]


def _is_twice(stored: dict[str, Tensor], name: str, prefixes: list[str]) -> bool:
    """Whether a tensor for the output layer is that of the embeddings, as peft writes it where they are tied."""
    twin = name.replace(prefixes[-1], prefixes[0])
    return twin != name and name in stored and twin in stored and torch.equal(stored[name], stored[twin])


def _is_trunk(model: nn.Module) -> bool:
    return model.base_model is model


def _names_for(model: nn.Module, stored: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter's tensors by the names that they have for `model`; and those of a head that it lacks."""
    # ".modules_to_save.": of older releases of peft
    tensors = {name.replace(".modules_to_save.", "."): tensor for name, tensor in stored.items()}
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    prefix, head = model.base_model_prefix + ".", {}
    of_trunk = not any(name.startswith(prefix) for name in tensors)
    if _is_trunk(model) and not of_trunk:
        head = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    elif of_trunk and not _is_trunk(model):
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return {PREFIX + name: tensor for name, tensor in tensors.items()}, head


def _aim_at_trunk(config, model: nn.Module):
    """Makes an adapter's config fit the model without a head."""
    config.task_type = None  # peft's classes for tasks look for a head
    prefix = model.base_model_prefix + "."
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        names = getattr(config, name, None)
        if isinstance(names, (list, set)):
            setattr(config, name, type(names)(full.removeprefix(prefix) for full in names))
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name, None) or {}
        setattr(config, name, {full.removeprefix(prefix): value for full, value in pattern.items()})
    there = [f".{name}" for name, _ in model.named_modules()]
    wanted = getattr(config, "modules_to_save", None) or ()
    config.modules_to_save = [name for name in wanted if any(one.endswith(f".{name}") for one in there)] or None


def _resize_embeddings(model: nn.Module, prefixes: list[str], stored: dict[str, Tensor], config, source):
    """Gives the embeddings the number of rows that the adapter's tensors have.

    Raises:
        UserError: it is another number, and the adapter doesn't hold the rows.
    """
    parts = [{k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)} for prefix in prefixes]
    sizes = set()
    for part, is_output in zip(parts, (False, True), strict=False):  # not every model has an output layer
        sizes |= _rows(part, is_output)
    had, tokens = vocabulary(model), getattr(config, "trainable_token_indices", None) or []
    if isinstance(tokens, dict):
        tokens = [token for of_layer in tokens.values() for token in of_layer]
    last = max(tokens, default=0)
    if last >= had and not sizes:
        sizes = {last + 1}
    if sizes <= {had}:
        return
    if len(sizes) > 1:
        raise UserError(f"the adapter in {source} has embeddings of several sizes: {sorted(sizes)}")
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        parts = parts[:1]
    if not all(any(_is_full_weight(name) for name in part) for part in parts):
        raise UserError(
            f"the adapter in {source} was trained with {sizes.pop()} tokens and doesn't hold their embeddings, and its "
            f"base model has {had}: save it with its embeddings (peft: save_embedding_layers=True), or merged"
        )
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def _rows(part: dict[str, Tensor], is_output: bool) -> set[int]:
    """How many tokens the tensors that an adapter has for the embeddings, or for the output layer, are for."""
    sizes = {tensor.shape[0] for name, tensor in part.items() if _is_full_weight(name)}
    sizes |= {tensor.shape[1] for name, tensor in part.items() if name.startswith("lora_embedding_A")}
    return sizes | {tensor.shape[0] for name, tensor in part.items() if is_output and name.startswith("lora_B")}


def _is_full_weight(name: str) -> bool:
    """`weight`, `base_layer.weight`, `token_adapter.base_layer.weight`, `original_module.weight`."""
    return name.endswith("weight") and "lora_" not in name
