"""Our Shardformer policy: Colossal-AI's built-in ones import names that transformers 5 dropped."""

from typing import Any

from colossalai.shardformer.policies.base_policy import Policy
from torch import nn

from coati.parallel.decoders import check_splits, find_decoder
from coati.parallel.pipeline import split_stage, tied_weights
from coati.parallel.sequence import MegatronSequenceLayout, UlyssesLayout, use_sequence_parallel_attention
from coati.parallel.tensor import (
    MegatronSequence,
    VocabularyLayout,
    shard_of,
    split_embedding,
    split_head,
    split_layers,
    sum_gradient,
    sum_over_ranks,
)


class DecoderPolicy(Policy):
    """Splits any decoder of `DECODERS`, bare or with a head, for `HybridParallelPlugin(custom_policy=...)`.

    A `layout` attribute of the model (as `coati.models` have) is set to how sequence and vocabulary are distributed.

    Args:
        split_sequence: with tensor parallelism, split the sequence between its layers too.
    """

    def __init__(self, split_sequence: bool = False):
        super().__init__()
        self.split_sequence = split_sequence

    def config_sanity_check(self):
        c, manager = self.shard_config, self.pipeline_stage_manager
        if c.enable_tensor_parallelism or manager is not None:
            check_splits(self.model, c.tensor_parallel_size, manager.num_stages if manager else 1, self.split_sequence)

    def preprocess(self) -> nn.Module:
        """Does all of the work: Shardformer's module descriptions don't support transformers 5."""
        c, model, manager = self.shard_config, self.model, self.pipeline_stage_manager
        self.shared_parameters = []
        if manager is not None:
            part, entry = find_decoder(model)
            self.shared_parameters = tied_weights(model, part, entry, manager)
            split_stage(model, part, entry, manager)
        if c.enable_tensor_parallelism:
            split_tensors(model, c.tensor_parallel_process_group, self.split_sequence)
        if c.enable_sequence_parallelism:
            group = c.sequence_parallel_process_group
            use_sequence_parallel_attention(transformer_of(model), group)
            model.layout = UlyssesLayout(group)
        return model

    def module_policy(self):
        return {}

    def postprocess(self) -> nn.Module:
        return self.model

    def get_held_layers(self) -> list[nn.Module]:
        """Everything that `split_stage` has left."""
        return list(self.model.modules())

    def get_shared_params(self):
        return self.shared_parameters


def split_tensors(model: Any, group, split_sequence: bool = False):
    """Tensor parallelism for whichever layers, embedding and output head the model (or stage) holds."""
    from transformers import PreTrainedModel

    sequence = MegatronSequence(group) if split_sequence else None

    part, entry = find_decoder(model)
    layers = [layer for layer in getattr(part, entry.layers) if any(True for _ in layer.parameters())]
    split_layers(layers, entry, group, sequence)
    if isinstance(getattr(part, entry.embedding), nn.Embedding):
        split_embedding(getattr(part, entry.embedding), group, sequence.total if sequence else sum_over_ranks)
    head = next((m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if isinstance(head, nn.Linear):
        split_head(head, group, sequence)
        model.layout = VocabularyLayout(group)
    if sequence:
        _split_between_layers(model, part, entry, sequence)


def _split_between_layers(model: Any, part: Any, entry, sequence: MegatronSequence):
    """Replicated weights see a stretch of the sequence only, so their gradients are summed over ranks."""
    for name in entry.positions:
        getattr(part, name).register_forward_hook(sequence.local_stretch)
    for parameter in model.parameters():
        if shard_of(parameter) is None:
            sum_gradient(parameter, sequence.group)
    use_sequence_parallel_attention(transformer_of(model), None)
    vocabulary = model.layout if isinstance(model.layout, VocabularyLayout) else None
    model.layout = MegatronSequenceLayout(sequence, vocabulary)


def transformer_of(model: nn.Module):
    """The outermost transformers model."""
    from transformers import PreTrainedModel

    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))
