"""Tensor, pipeline and sequence parallelism: the part of a model that one rank has."""

from dataclasses import dataclass

from torch import Tensor, nn

from coati.models.base import BaseModel


@dataclass(frozen=True)
class Sizes:
    """How many ways each kind of parallelism cuts the run."""

    data: int
    tensor: int
    pipeline: int
    sequence: int


def sizes(config, gpus: int) -> Sizes:
    """Data-parallel ranks are what the other kinds leave."""
    split = config.tensor_parallel, config.pipeline_parallel, config.sequence_parallel
    return Sizes(gpus // config.model_parallel_size, *split)


def shrink_to_stage(shape, layers: int | None, stages: int):
    """Leaves the layers of one pipeline stage in a transformers config; `layers` overrides the model's depth."""
    text = shape.get_text_config()
    depth = -(-(layers or text.num_hidden_layers) // stages)
    text.num_hidden_layers = depth
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = kinds[:depth]


def split_tensors(model: BaseModel, parts: int):
    """Cuts the weights as tensor parallelism does; the cut model computes nonsense of the right shapes."""
    from coati.parallel.decoders import check_splits, find_decoder

    check_splits(model, parts, 1)
    decoder, entry = find_decoder(model)
    for layer in getattr(decoder, entry.layers):
        for name in entry.column:
            _cut(layer.get_submodule(name), True, parts)
        for name in entry.row:
            _cut(layer.get_submodule(name), False, parts)
        for name in entry.counts:
            owner, _, count = name.rpartition(".")
            module = layer.get_submodule(owner)
            setattr(module, count, getattr(module, count) // parts)
    embedding, head = getattr(decoder, entry.embedding), model.transformer.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    _cut(embedding, True, parts)
    if head is not None:
        _cut(head, True, parts)
    if tied:
        head.weight = embedding.weight


def leave_out_other_stages(model: BaseModel, first: bool, last: bool):
    """Marks the ends of the model that other pipeline stages have; tied ends are on both."""
    embedding, head = model.transformer.get_input_embeddings(), model.transformer.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return
    for module, here in ((embedding, first), (head, last)):
        if module is not None and not here:
            module.requires_grad_(False)
            module.weight.elsewhere = True


def body(model: BaseModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last hidden states: what a stage that isn't the last computes."""
    return model.transformer.base_model(input_ids, attention_mask=attention_mask.long(), use_cache=False)[0]


def micro_batches_in_flight(config, sizes: Sizes, stage: int) -> int:
    """Micro-batches whose activations a stage of the 1F1B schedule holds at once."""
    rows = config.batch_size // getattr(config, "minibatches", 1) // sizes.data
    return max(1, min(sizes.pipeline - stage, rows // config.rows_per_pass))


def _cut(module: nn.Module, outputs: bool, parts: int):
    """One rank's share of a linear layer's outputs, or of its inputs."""
    swapped = not isinstance(module, nn.Linear | nn.Embedding)  # transformers' Conv1D
    dim = 0 if outputs != swapped else 1
    size = -(-module.weight.shape[dim] // parts)
    module.weight = _first(module.weight, dim, size)
    if outputs and getattr(module, "bias", None) is not None:
        module.bias = _first(module.bias, 0, size)
    if swapped:
        module.nf = module.weight.shape[1]


def _first(parameter: nn.Parameter, dim: int, size: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().narrow(dim, 0, size).clone(), parameter.requires_grad)
