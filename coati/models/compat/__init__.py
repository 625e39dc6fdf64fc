"""TRL's value-head models and reference models, under TRL's names and with its checkpoints."""

from coati.models.compat.reference import create_reference_model
from coati.models.compat.wrapper import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "create_reference_model",
]
