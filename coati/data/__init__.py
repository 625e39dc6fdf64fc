"""From files of dialogues to batches: formats, chat templates and masks, tokenizing, collating, sampling.

Batches are imported when they are asked for: that a data file is missing is said before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from coati.data.config import DataConfig
from coati.data.dataset import TokenizedDataset, build_dataset
from coati.data.records import (
    PreferenceRecord,
    PromptRecord,
    ScoredRecord,
    SFTRecord,
    StepwiseRecord,
    UnpairedRecord,
    parse_record,
)
from coati.data.report import ValidationReport
from coati.data.sampling import BatchSampler, shard_batch, split_micro_batches
from coati.data.sources import load_rows
from coati.data.templates import prepare_tokenizer
from coati.data.tokenize import (
    PreferenceSample,
    PromptSample,
    ScoredSample,
    StepwiseSample,
    TokenSequence,
    TooLong,
    UnpairedSample,
    mismatched_sequence,
    tokenize,
)

if TYPE_CHECKING:
    from coati.data.collate import (
        PreferenceBatch,
        ScoredBatch,
        SFTBatch,
        StepwiseBatch,
        UnpairedBatch,
        collate_preference,
        collate_scored,
        collate_sft,
        collate_stepwise,
        collate_unpaired,
    )

BATCHES = (
    "PreferenceBatch",
    "SFTBatch",
    "ScoredBatch",
    "StepwiseBatch",
    "UnpairedBatch",
    "collate_preference",
    "collate_scored",
    "collate_sft",
    "collate_stepwise",
    "collate_unpaired",
)
__all__ = [
    "BatchSampler",
    "DataConfig",
    "PreferenceBatch",
    "PreferenceRecord",
    "PreferenceSample",
    "PromptRecord",
    "PromptSample",
    "SFTBatch",
    "SFTRecord",
    "ScoredBatch",
    "ScoredRecord",
    "ScoredSample",
    "StepwiseBatch",
    "StepwiseRecord",
    "StepwiseSample",
    "TokenSequence",
    "TokenizedDataset",
    "TooLong",
    "UnpairedBatch",
    "UnpairedRecord",
    "UnpairedSample",
    "ValidationReport",
    "build_dataset",
    "collate_preference",
    "collate_scored",
    "collate_sft",
    "collate_stepwise",
    "collate_unpaired",
    "mismatched_sequence",
    "load_rows",
    "parse_record",
    "prepare_tokenizer",
    "shard_batch",
    "split_micro_batches",
    "tokenize",
]


def __getattr__(name: str):
    if name not in BATCHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("coati.data.collate"), name)
