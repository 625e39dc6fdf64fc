"""What Actor, Critic and RewardModel share: a transformers model from a path, a config or both."""

import copy
import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.adapters import copied_to, has_more_tokens, load_adapter, merged, unsaved
from coati.models.attention import check_attention, set_eager_where_capped
from coati.models.cache import cache_name
from coati.models.classifier import score_weight, stored_classifier
from coati.models.generation_config import repair_generation_config
from coati.models.layout import Layout
from coati.models.long_rows import Pack, Unpack, checkpointing_keeping_by
from coati.models.lora import LoraSettings, add_lora, base_of_adapter, experts_note, is_adapter
from coati.models.objectives import objective_weights
from coati.models.packed import PackedGroups, PackedRows
from coati.models.quantized import (
    check_mergeable,
    is_quantized,
    prepare_quantized,
    quantization_note,
    wanted_quantization,
)
from coati.models.quiet import quiet_transformers
from coati.models.towers import freeze_towers, without_towers

VALUE_HEAD_FILE = "value_head.safetensors"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


NEED_CUDA = ("flash_attention_2", "flex_attention")  # the latter has no backward pass on a CPU


class BaseModel(nn.Module):
    """Wraps the transformer (without a head) that `AutoModel` makes.

    Args:
        pretrained: folder or name of a checkpoint, or a transformers model; a folder with a LoRA adapter loads its base
            model and the adapter.
        config: a transformers config. Alone: random weights; with `pretrained`: its weights under this config.
        lora: adapters to add.
        quantize_base: have the weights of linear layers in 4 bits (`coati.models.quantized.nf4`), if the folder's are
            not in a few bits already. The base of an adapter that was trained so is quantized in any case.
        **kwargs: passed to `from_pretrained` (or `from_config`): dtype, revision, attn_implementation ("auto" if not
            given: what the model supports), ...

    Attributes:
        model: the transformers model (inside a PeftModel if there are adapters).
        config: its config.
        last_hidden_state_size: width of the last hidden states, which value heads read.
        takes_positions: whether the transformer reads position ids.
        hides_right_padding: whether causal attention alone keeps real tokens from padding to their right.
        padding_free: whether rows are read one after the other, without their padding, see `PackedRows`.
        cache_name: the keyword by which it takes a cache.
        layout: how sequence and vocabulary are distributed over processes; sharded models get another.
        notes: lines for the user on what was changed in the stored model.

    Raises:
        ValueError: neither `pretrained` nor `config`; a folder without a model; FlashAttention-2 without CUDA.
    """

    auto_class = "AutoModel"

    def __init__(
        self,
        pretrained: str | Path | nn.Module | None = None,
        config=None,
        *,
        lora: LoraSettings | None = None,
        quantize_base: bool = False,
        **kwargs,
    ):
        super().__init__()
        if pretrained is None and config is None:
            raise UserError(f"{type(self).__name__} needs a pretrained path, a config, or both")
        attention = kwargs.get("attn_implementation")
        if attention in NEED_CUDA and not torch.cuda.is_available():
            raise UserError(f"{attention} needs CUDA: leave attn_implementation at auto, which is sdpa on this machine")
        is_adapted = isinstance(pretrained, str | Path) and is_adapter(pretrained)
        source = base_of_adapter(pretrained) if is_adapted else pretrained
        quantization = wanted_quantization(pretrained if is_adapted else None, quantize_base)
        quantized = {} if quantization is None else _quantized(source, quantization, kwargs)
        self.model, head = self._load_transformer(source, config, kwargs | quantized)
        self.config = self.model.config
        if quantized:
            prepare_quantized(self.model, kwargs.get("dtype"))
        towers_note = freeze_towers(self.model)
        if source is not None and config is None and not isinstance(source, nn.Module):
            towers_note = towers_note or without_towers(stored_config(source, kwargs), self.config)
        self.last_hidden_state_size = hidden_size(self.config)
        if is_adapted:
            self.model, head_of_adapter = load_adapter(self.model, pretrained)
            head = head_of_adapter or self._stored_head(pretrained) or head
        elif lora is not None and lora.rank > 0:
            self.model = add_lora(self.model, lora)
        self._make_head(head, pretrained)
        notes = [repair_generation_config(self.transformer), router_note(self.config), towers_note]
        if quantized:
            notes.append(quantization_note(self.transformer))
        if lora is not None and not is_adapted:
            notes.append(experts_note(self.transformer, lora))
        self.notes = [note for note in notes if note]
        self.layout, self.padding_free = Layout(), False
        forward = inspect.signature(self.transformer.forward).parameters
        self.takes_positions, self._keeps_logits = "position_ids" in forward, "logits_to_keep" in forward
        causal = {part.is_causal for part in self.transformer.modules() if hasattr(part, "is_causal")}
        self.hides_right_padding = self.takes_positions and causal == {True}
        self.cache_name = cache_name(self.transformer)
        # router logits are for transformers' load-balancing loss, of a micro-batch, and need masks of whole rows
        self._options = {"output_router_logits": False} if "output_router_logits" in forward else {}

    def _load_transformer(self, source, config, kwargs: dict) -> tuple[nn.Module, dict[str, Tensor]]:
        """The transformers model of a folder (or name, or the model itself), and the head that is stored there."""
        return load_transformer(self.auto_class, source, config, kwargs), self._stored_head(source)

    def _stored_head(self, source) -> dict[str, Tensor]:
        """The tensors of a head that lie beside a transformer."""
        return {}

    def _make_head(self, stored: dict[str, Tensor], source):
        """Adds this class's head; with these tensors (by the last part of their names), if there are any."""

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def transformer(self) -> nn.Module:
        """The transformers model itself, inside any adapter."""
        return self.model.get_base_model() if self.has_adapter else self.model

    def resize_token_embeddings(self, *args, **kwargs):
        """`PreTrainedModel.resize_token_embeddings`."""
        return self.model.resize_token_embeddings(*args, **kwargs)

    def enable_gradient_checkpointing(self, kept_by: tuple[Pack, Unpack] | None = None):
        """Recomputes activations in the backward pass.

        Args:
            kept_by: what keeps the layers' inputs and gives them back, see `coati.models.long_rows`.
        """
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kept_by is not None:
            self.transformer._set_gradient_checkpointing(True, checkpointing_keeping_by(*kept_by))
        if self.has_adapter:
            self.model.enable_input_require_grads()

    def lay_out(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        right_padded: bool = False,
        shared_prefix_group: int = 1,
    ) -> tuple[PackedGroups | PackedRows | None, dict[str, Any]]:
        """What `run` takes to read a batch, and, if its rows are packed for that, how.

        Args:
            input_ids, attention_mask: `[batch, seq]`.
            right_padded: padding stands on the right only, see `run`.
            shared_prefix_group: so many rows (i, i + batch / group, ...) are a group, and their shared prefix is read
                once, see `PackedGroups`. For unsharded models only.
        """
        attention = self.config._attn_implementation
        if shared_prefix_group > 1:
            groups = PackedGroups.from_rows(input_ids, attention_mask, shared_prefix_group)
            return groups, groups.inputs(self.model.dtype, attention)
        if self.padding_free and attention_mask is not None:
            rows = PackedRows.from_rows(input_ids, attention_mask)
            return rows, rows.inputs(attention)
        return None, dict(input_ids=input_ids, attention_mask=attention_mask, right_padded=right_padded)

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        right_padded: bool = False,
        **of_kernel: Any,
    ):
        """The transformers model's output, of this process's part of the sequence.

        Args:
            attention_mask: `[batch, seq]`. Padding may stand on either side: positions count real tokens. Or, with
                `position_ids`, what is added to attention's scores, `[batch, 1, seq, seq]`, or a block mask of it.
            position_ids: `[batch, seq]`, of rows that hold several documents: 0 begins one, which attends to no other
                (if `isolates_documents`). They replace the mask; padding is documents of one token.
            right_padded: padding stands on the right only. The model gets no mask then, if it needs none: attention
                kernels without a mask are faster, and a GPU doesn't wait for the host to inspect it.
            **of_kernel: what an attention kernel takes besides.
        """
        layout = self.layout
        inputs = {"input_ids": layout.split(input_ids), "use_cache": False, **self._options, **of_kernel}
        if position_ids is not None:
            inputs["position_ids"] = layout.split(position_ids)
            if attention_mask is not None and len(attention_mask.shape) == 4:
                inputs["attention_mask"] = attention_mask
        elif right_padded and self.hides_right_padding:
            if not layout.is_plain:  # transformers counts from 0 in each process's part
                columns = torch.arange(input_ids.shape[1], device=input_ids.device)
                inputs["position_ids"] = layout.split(columns.expand_as(input_ids))
            with one_document_per_row():
                return self.model(**inputs)
        elif attention_mask is not None:
            inputs["attention_mask"] = layout.pad(attention_mask.long())
            if self.takes_positions:
                inputs["position_ids"] = layout.split((attention_mask.long().cumsum(-1) - 1).clamp(min=0))
        return self.model(**inputs)

    @torch.no_grad()
    def isolates_documents(self) -> bool:
        """Whether position ids that restart hide a row's earlier documents; some architectures ignore them."""
        if not self.takes_positions:
            return False
        training, device = self.training, next(self.parameters()).device
        rows = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]], device=device)
        positions = torch.tensor([0, 1, 0, 1], device=device)
        self.eval()
        outputs = [self.run(row[None], None, positions[None])[0] for row in rows]
        self.train(training)
        return torch.equal(outputs[0][:, 2:], outputs[1][:, 2:])

    def save_pretrained(
        self,
        folder: str | Path,
        state_dict: dict[str, Tensor] | None = None,
        merge: bool = False,
        dtype: torch.dtype | None = None,
    ):
        """Writes a HF folder that plain transformers opens.

        With adapters: the adapter's folder, or with `merge` the weights with the adapters added in.

        Args:
            state_dict: this module's full state if it isn't in the module itself (sharded plugins); CPU tensors.
            dtype: of the transformer's weights; as they are if not given. Adapters by themselves stay as they are.
        """
        state = self.state_dict() if state_dict is None else state_dict
        inner = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        head = {k: v for k, v in state.items() if k.startswith("v_head.")}  # of an ActorCritic
        if self.has_adapter and merge:
            merged_model = merged(self.model, inner)
            merged_model = merged_model if dtype is None else merged_model.to(dtype)
            merged_model.save_pretrained(str(folder), state_dict=merged_model.state_dict() | head)
        elif self.has_adapter:
            more = has_more_tokens(self.model)
            self.model.save_pretrained(str(folder), state_dict=inner, save_embedding_layers=more)
            self.config.save_pretrained(str(folder))
        else:
            inner = inner if dtype is None else cast(inner, dtype)
            self.transformer.save_pretrained(str(folder), state_dict=inner | head)
            if dtype is not None:  # it wrote the module's own
                config = copy.deepcopy(self.config)
                config.dtype = dtype
                config.save_pretrained(str(folder))

    def try_saving(self, folder: str | Path, merge: bool = False):
        """Writes what `save_pretrained` writes except weights, so that it fails early where that would fail.

        Raises:
            UserError: an adapter that can't be merged, or whose folder would lack trained weights.
        """
        if not self.has_adapter:
            self.transformer.save_pretrained(str(folder), state_dict={})
            return
        lost = unsaved(self.model)
        if lost:
            raise UserError(f"{len(lost)} trained weights would not be saved in the adapter's folder: {lost[0]}")
        for config in self.model.peft_config.values():
            config.save_pretrained(str(folder))
        self.config.save_pretrained(str(folder))
        if not merge:
            return
        check_mergeable(self.transformer)
        if not is_quantized(self.transformer):
            merged(copied_to(self.model, "meta")).save_pretrained(str(folder), state_dict={})


class ValueHeadModel(BaseModel):
    """A transformer with a linear head on the last hidden states, of one output but in an `ObjectiveRewardModel`. The
    head is never frozen by LoRA.

    The head is stored as `value_head.safetensors` beside the transformer, so that the folder still opens in plain
    `AutoModel`; it is read back if the folder has one. A sequence classifier of one label gives its `score` as the
    head, where that is a linear layer at the last token; so does an adapter that was trained on one. Otherwise the
    head is initialized.

    Args:
        weights: of the objectives of a folder whose head has an output for each (`ObjectiveRewardModel`): the head
            becomes their weighted sum.
        **kwargs: as `BaseModel`.

    Raises:
        UserError: see `objective_weights`.
    """

    head_bias = True

    def __init__(self, pretrained=None, config=None, *, weights: Mapping[str, float] | None = None, **kwargs):
        self.weights = weights
        super().__init__(pretrained, config, **kwargs)

    def _load_transformer(self, source, config, kwargs: dict) -> tuple[nn.Module, dict[str, Tensor]]:
        stored = stored_classifier(source) if isinstance(source, str | Path) else None
        if stored is None:
            return super()._load_transformer(source, config, kwargs)
        if config is not None:
            config = copy.deepcopy(config)
            config.num_labels = stored.num_labels
        classifier = load_transformer("AutoModelForSequenceClassification", source, config, kwargs)
        return classifier.base_model, {"weight": score_weight(classifier).detach()}

    def check_head(self, source: str | Path):
        """Raises a UserError where the head is new, since the folder that the model is from has none."""
        if not self.head_is_stored:
            raise UserError(
                f"{source} has no head, so it is no reward model: name one, such as the model of a run of coati reward"
            )

    def _stored_head(self, source) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        path = Path(source) / VALUE_HEAD_FILE if isinstance(source, str | Path) else None
        return load_file(path) if path is not None and path.is_file() else {}

    def _make_head(self, stored: dict[str, Tensor], source):
        if isinstance(source, str | Path) and (stored or self.weights is not None):
            weights = objective_weights(source, self.weights)
            if weights is not None:
                if not stored:
                    raise UserError(f"{source} has objectives but no head: put its {VALUE_HEAD_FILE} there")
                total = torch.tensor([*weights.values()]) @ stored["weight"].float()
                stored = {"weight": total[None]}
        if hasattr(self.config, "objectives"):
            del self.config.objectives  # of another head than this one
        self._add_head(1, stored, source)

    def _add_head(self, outputs: int, stored: dict[str, Tensor], source):
        """A head of so many outputs, with the stored tensors if there are any."""
        self.value_head = nn.Linear(self.last_hidden_state_size, outputs, bias=self.head_bias)
        nn.init.normal_(self.value_head.weight, std=1 / (self.last_hidden_state_size + 1))
        if self.head_bias:
            nn.init.zeros_(self.value_head.bias)
        self.value_head.to(next(self.model.parameters()).dtype)
        self.head_is_stored = bool(stored)
        if not stored:
            return
        initial = self.value_head.state_dict()
        # a critic may start from a reward model, whose head has no bias
        wrong = [name for name in initial.keys() ^ stored.keys() if name != "bias" or name in stored]
        wrong += [name for name in initial.keys() & stored.keys() if initial[name].shape != stored[name].shape]
        if wrong:
            stored_shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in stored.items())
            raise UserError(f"the head in {source} ({stored_shapes}) is no value head of this model: {wrong[0]}")
        self.value_head.load_state_dict(stored, strict=False)

    def token_values(self, input_ids: Tensor, attention_mask: Tensor | None, right_padded: bool = False) -> Tensor:
        """The output at every position of a head that has one, float32 `[batch, seq]`."""
        return self.token_outputs(input_ids, attention_mask, right_padded).squeeze(-1)

    def token_outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        right_padded: bool = False,
        shared_prefix_group: int = 1,
    ) -> Tensor:
        """The head's outputs at every position, float32 `[batch, seq, outputs]`. Arguments as `lay_out`.

        A policy whose output layer is padded to more rows may sample ids that are no tokens. What this model has no
        embedding of it reads as its last one.
        """
        known = input_ids.clamp(max=self.config.get_text_config().vocab_size - 1)
        packed, inputs = self.lay_out(known, attention_mask, right_padded, shared_prefix_group)
        hidden = self.run(**inputs).last_hidden_state
        values = in_float32(self.value_head, packed.unpack(hidden) if packed else hidden)
        return self.layout.gather(values)[:, : input_ids.shape[1]]

    def save_pretrained(self, folder, state_dict=None, merge: bool = False, dtype: torch.dtype | None = None):
        """As `BaseModel.save_pretrained`, with the head."""
        from safetensors.torch import save_file

        super().save_pretrained(folder, state_dict, merge, dtype)
        state = self.state_dict() if state_dict is None else state_dict
        head = {k.removeprefix("value_head."): v.contiguous() for k, v in state.items() if k.startswith("value_head.")}
        save_file(head, Path(folder) / VALUE_HEAD_FILE)


def in_float32(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What a head gives, float32 `[..., outputs]`, for hidden states `[..., width]`: neither bf16 weights nor autocast
    round it to 8 bits of mantissa."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)


@contextmanager
def one_document_per_row():
    """Inside, transformers doesn't inspect positions for several documents per row, which would synchronize host and
    GPU in each forward pass."""
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _stay_in_evaluation(part: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a module whose parts change their mode, and which doesn't."""
    nn.Module.train(part, mode)
    part.training = False
    return part


def stored_dtype(source: str | Path) -> torch.dtype | None:
    """What the config of a checkpoint on this machine says of its weights."""
    from transformers import AutoConfig

    try:
        dtype = getattr(AutoConfig.from_pretrained(str(source), local_files_only=True), "dtype", None)
    except (OSError, ValueError):
        return None
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def router_note(config) -> str | None:
    """A note on router logits that the config asks for, which are not read."""
    if not getattr(config.get_text_config(), "output_router_logits", False):
        return None
    return "config.json asks for router logits, for a load-balancing loss: ignored, --router_loss is ours"


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors in another dtype; tied ones stay one tensor."""
    done: dict[tuple, Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            done.setdefault(_storage_key(tensor), tensor.to(dtype))
    return {name: done.get(_storage_key(tensor), tensor) for name, tensor in state.items()}


def _storage_key(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def hidden_size(config) -> int:
    """Width of the last hidden states, read from the config: no forward pass, no device move.

    Raises:
        UserError: the config has none of the known names.
    """
    for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
        # OPT projects its hidden states back to the embedding's width before the head
        for name in ("word_embed_proj_dim", "hidden_size", "d_model", "n_embd"):
            size = getattr(part, name, None)
            if isinstance(size, int):
                return size
    raise UserError(f"{type(config).__name__} has no hidden_size (nor word_embed_proj_dim, d_model, n_embd)")


def disable_dropout(module: nn.Module):
    """Removes all noise from training: with noise, a policy's ratio to itself is not 1. Dropout probabilities become 0;
    routers of experts, which jitter their inputs or draw experts in training, choose as in evaluation."""
    for part in module.modules():
        if any("jitter" in name for name in vars(part)):
            part.train = MethodType(_stay_in_evaluation, part)
            part.train()
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        # some models keep the probability as a number: attention_dropout, dropout, layerdrop, ...
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def load_transformer(auto_class, pretrained, config, kwargs: dict) -> nn.Module:
    """What transformers' `auto_class` makes of a checkpoint, a config or both.

    Args:
        auto_class: one of transformers' auto classes, or its name.
        kwargs: `attn_implementation` may be "auto": what the model supports.

    Raises:
        UserError: it can't be loaded, or lacks weights; an attention kernel that the model can't use.
    """
    import transformers

    if isinstance(pretrained, nn.Module):
        return pretrained
    auto = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    attn_implementation = kwargs.get("attn_implementation", "auto")
    if attn_implementation == "auto":
        kwargs = {name: value for name, value in kwargs.items() if name != "attn_implementation"}
    if pretrained is None:
        check_attention(config, attn_implementation)
        try:
            model = auto.from_config(config, **kwargs)
        except ValueError as error:
            raise UserError(f"can't make a model of this config: {_reason(error, auto)}") from error
    else:
        model = _load_checkpoint(auto, str(pretrained), config, attn_implementation, kwargs)
    if attn_implementation == "auto":
        set_eager_where_capped(model)
    return model


def _reason(error: Exception, auto) -> str:
    """Why transformers' `auto` class made no model, in a line."""
    if "Unrecognized configuration class" in str(error):  # of images, or of text to text
        return f"it is no language model that transformers' {auto.__name__} knows, and coati trains no other"
    return str(error).splitlines()[0]


def hub_options(kwargs: dict) -> dict:
    """Those of a model's keywords that say where its files are."""
    return {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}


def stored_config(source, kwargs: dict):
    """The config beside a checkpoint's weights.

    Args:
        kwargs: those of `BaseModel`.
    """
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(source), **hub_options(kwargs))


def _quantized(source, quantization, kwargs: dict) -> dict:
    """Keywords of `from_pretrained` that quantize the weights of a folder, as they are there, whatever dtype is wanted
    of the others: the same base is the same in 4 bits everywhere. None where they are in a few bits already.

    Args:
        source: the folder; quantization: transformers' config of it; kwargs: those of `BaseModel`.

    Raises:
        UserError: there is no folder.
    """
    if not isinstance(source, str | Path):
        raise UserError("quantize_base needs the folder of a pretrained model: random weights have no use in 4 bits")
    stored = stored_config(source, kwargs)
    if getattr(stored, "quantization_config", None) is not None:
        return {}
    dtype = kwargs.get("dtype")
    quantization.bnb_4bit_compute_dtype = dtype if isinstance(dtype, torch.dtype) else stored.dtype or torch.float32
    return {"quantization_config": quantization, "dtype": "auto"}


def _load_checkpoint(auto, source: str, config, attn_implementation: str, kwargs: dict) -> nn.Module:
    if config is not None:
        kwargs = {**kwargs, "config": config}
    with quiet_transformers():  # its report calls the head that we skip "unexpected", and errors are ours to raise
        try:
            options = {"ignore_mismatched_sizes": True, **kwargs}  # ours to report, by name
            model, info = auto.from_pretrained(source, output_loading_info=True, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"can't load a model from {source}: {_reason(error, auto)}") from error
    wrong, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    if wrong:
        name, stored, expected = wrong[0]
        raise UserError(f"the weights in {source} don't fit its config: {name} is {list(stored)}, not {list(expected)}")
    if missing:
        raise UserError(
            f"the checkpoint in {source} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}"
        )
    check_attention(model.config, attn_implementation)
    prepare_quantized(model, kwargs.get("dtype"))
    return model
