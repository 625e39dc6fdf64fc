"""Where the parts of a decoder are: what tensor and pipeline parallelism must know of an architecture.

A new architecture needs an entry in `DECODERS`, not code: see docs/add-an-architecture.md.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from coati.errors import UserError
from coati.models.adapters import LANGUAGE_MODEL_HEADS


@dataclass(frozen=True)
class Decoder:
    """Paths within the module that holds the layers, and within one layer.

    Attributes:
        layers: the list of layers.
        embedding: the token embedding.
        positions: modules whose output is added to the embedding.
        entrance: other modules that the embedding passes before the first layer (dropout, projections).
        column: linear layers of one layer whose outputs are split over ranks (their inputs are replicated).
        row: linear layers whose inputs are split (their outputs are sums over ranks).
        fused: those of `column` that hold several projections in one weight, and how many.
        per_head: modules with replicated weights that each rank uses on its own heads only.
        counts: attributes of a layer that count what is split (heads, widths).
        vectors: parameters with a number for each head.
        across_heads: RMS norms over the columns of all heads together.
        experts: the module that holds all experts' weights; their number is split over ranks. The module around it is
            their block: router, experts, and what `column` and `row` name of experts that every token uses.
        splits_sequence: the code between layers works on a part of the sequence (no shape depends on its length).
    """

    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: tuple[str, ...] = ()
    entrance: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    row: tuple[str, ...] = ()
    fused: tuple[tuple[str, int], ...] = ()
    per_head: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    across_heads: tuple[str, ...] = ()
    experts: str = ""
    splits_sequence: bool = True

    @property
    def block_of_experts(self) -> str:
        return self.experts.rpartition(".")[0]


LLAMA = Decoder(
    column=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    row=("self_attn.o_proj", "mlp.down_proj"),
)
OF_EXPERTS = Decoder(column=LLAMA.column[:3], row=LLAMA.row[:1], experts="mlp.experts")
LLAMA_OF_EXPERTS = replace(LLAMA, experts="mlp.experts")  # a layer has either a dense feed-forward part or experts
QUERIES_AND_KEYS = ("self_attn.q_norm", "self_attn.k_norm")


def with_shared_experts(entry: Decoder, name: str) -> Decoder:
    """With an MLP in the block of experts that every token passes."""
    shared = f"{entry.block_of_experts}.{name}"
    column = (f"{shared}.gate_proj", f"{shared}.up_proj")
    return replace(entry, column=entry.column + column, row=(*entry.row, f"{shared}.down_proj"))


DECODERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, per_head=QUERIES_AND_KEYS),
    "gemma": LLAMA,
    "olmo2": replace(LLAMA, across_heads=QUERIES_AND_KEYS),
    "phi": Decoder(
        entrance=("embed_dropout",),
        column=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
        row=("self_attn.dense", "mlp.fc2"),
        per_head=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    "gpt2": Decoder(
        layers="h",
        embedding="wte",
        positions=("wpe",),
        entrance=("drop",),
        column=("attn.c_attn", "mlp.c_fc"),
        row=("attn.c_proj", "mlp.c_proj"),
        fused=(("attn.c_attn", 3),),
        counts=("attn.split_size",),
        splits_sequence=False,
    ),
    "opt": Decoder(
        positions=("embed_positions",),
        entrance=("project_in",),
        column=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"),
        row=("self_attn.out_proj", "fc2"),
        counts=("self_attn.num_heads",),
    ),
    "mixtral": OF_EXPERTS,
    "olmoe": replace(OF_EXPERTS, across_heads=QUERIES_AND_KEYS),
    "qwen2_moe": with_shared_experts(LLAMA_OF_EXPERTS, "shared_expert"),
    "qwen3_moe": replace(LLAMA_OF_EXPERTS, per_head=QUERIES_AND_KEYS),
    "glm4_moe": with_shared_experts(replace(LLAMA_OF_EXPERTS, per_head=QUERIES_AND_KEYS), "shared_experts"),
    "deepseek_v3": with_shared_experts(
        Decoder(
            column=("self_attn.q_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.gate_proj", "mlp.up_proj"),
            row=LLAMA.row,
            per_head=(
                "self_attn.q_a_proj",
                "self_attn.q_a_layernorm",
                "self_attn.kv_a_proj_with_mqa",
                "self_attn.kv_a_layernorm",
            ),
            experts="mlp.experts",
        ),
        "shared_experts",
    ),
    "gpt_oss": replace(OF_EXPERTS, vectors=("self_attn.sinks",), splits_sequence=False),
}


def find_decoder(module: nn.Module) -> tuple[Any, Decoder]:
    """The part of a model that holds its layers, and its description. Any head may be around it.

    Raises:
        UserError: an architecture that isn't in the table.
    """
    types: dict[str | None, None] = {}
    for part in module.modules():
        kind = getattr(getattr(part, "config", None), "model_type", None)
        types[kind] = None
        entry = DECODERS.get(str(kind))
        # not by getattr: peft's wrappers answer for what they wrap
        if entry is not None and isinstance(dict(part.named_children()).get(entry.layers), nn.ModuleList):
            return part, entry
    names = ", ".join(str(kind) for kind in types if kind)
    raise UserError(
        f"tensor and pipeline parallelism support {', '.join(DECODERS)}, not {names}: use --plugin zero2 or gemini, or "
        "add its description (docs/add-an-architecture.md)"
    )


def check_splits(module: nn.Module, tensor_parallel: int, pipeline_parallel: int, split_sequence: bool = False):
    """Checks that a model's layers and heads divide evenly over so many ranks.

    Raises:
        UserError: they don't; it names the numbers, and what does divide.
    """
    part, entry = find_decoder(module)
    config, depth = part.config, len(getattr(part, entry.layers))
    if depth < pipeline_parallel:
        raise UserError(f"the model has {depth} layers: pipeline_parallel {pipeline_parallel} leaves stages empty")
    if pipeline_parallel > 1 and getattr(config, "layerdrop", None):
        raise UserError("layerdrop skips whole layers at random, which pipeline stages can't: set layerdrop to 0")
    if split_sequence and not entry.splits_sequence:
        raise UserError(f"{config.model_type}'s code can't split the sequence between layers: leave out split_sequence")
    counts = split_counts(part, entry)
    for name, count in counts.items():
        if count % tensor_parallel:
            raise UserError(
                f"the model has {count} {name}: not divisible by tensor_parallel {tensor_parallel}; "
                + remedy_for_splits("tensor_parallel", math.gcd(*counts.values()))
            )
    if tensor_parallel > 1:
        check_adapters(module, entry)


def check_adapters(module: nn.Module, entry: Decoder):
    """Checks that tensor parallelism can split a model's adapters.

    Raises:
        UserError: one of them is not LoRA of a linear layer, or lies on the embedding or the output layer.
    """
    for name, layer in module.named_modules():
        adapted = getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)  # peft's names
        if adapted is None:
            continue
        of_experts = bool(entry.experts) and entry.experts in name
        if of_experts or isinstance(adapted, nn.Embedding) or name.rpartition(".")[2] in LANGUAGE_MODEL_HEADS:
            raise UserError(
                f"tensor_parallel splits {name}, which has an adapter: leave it out of lora_target_modules, or use "
                "--plugin zero2"
            )
        if name.endswith((*entry.column, *entry.row)) and not is_plain_lora(layer):
            raise UserError(
                f"tensor_parallel splits LoRA's adapters, and that of {name} is of another kind: use --plugin zero2, "
                "or merge it into the model first"
            )


def is_plain_lora(layer: Any) -> bool:
    """Whether a layer's adapter is B A alone: no DoRA, no biases, no copy of the layer that trains."""
    return bool(getattr(layer, "lora_A", None)) and not layer.lora_variant and not any(layer.lora_bias.values())


def remedy_for_splits(setting: str, divided: int) -> str:
    """What a setting that must divide a number may be instead.

    >>> remedy_for_splits("tensor_parallel", 6)
    'set tensor_parallel to 2, 3 or 6'
    >>> remedy_for_splits("tensor_parallel", 1)
    'leave tensor_parallel out'
    """
    sizes = [str(size) for size in range(2, divided + 1) if divided % size == 0]
    if not sizes:
        return f"leave {setting} out"
    *others, largest = sizes
    return f"set {setting} to {', '.join(others)} or {largest}" if others else f"set {setting} to {largest}"


def split_counts(part: Any, entry: Decoder) -> dict[str, int]:
    """What tensor parallelism must divide: heads, key-value heads, widths of feed-forward parts, experts."""
    heads = part.config.num_attention_heads
    counts = {"attention heads": heads, "key-value heads": getattr(part.config, "num_key_value_heads", None) or heads}
    for layer in getattr(part, entry.layers):
        modules: dict[str, Any] = dict(layer.named_modules())
        if entry.experts and entry.experts in modules:
            counts["experts"] = modules[entry.experts].num_experts
        for name in entry.row[1:]:  # the first is attention's
            if name in modules:
                linear = getattr(modules[name], "base_layer", modules[name])
                width = linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0]
                is_shared = entry.experts != "" and name.startswith(f"{entry.block_of_experts}.shared")
                counts["columns of shared experts" if is_shared else "feed-forward columns"] = width
    return counts
