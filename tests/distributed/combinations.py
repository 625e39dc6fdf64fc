"""Every plugin, precision and way of splitting with every feature: refused in words, or a step of training."""

import itertools
import json
from pathlib import Path
from unittest import mock

import torch

from coati.config.plugin import PLUGINS
from coati.errors import UserError
from coati.losses import cross_entropy
from coati.models import Actor
from coati.models.lora import LoraSettings
from coati.parallel import PluginConfig, check_plugin, launch
from coati.parallel.factory import engine_class, make_engine
from coati.parallel.runtime import Runtime, shutdown
from tests.distributed.world import family_config

PRECISIONS = ("fp32", "bf16", "fp16")
SPLITS = {
    "whole": {},
    "tensor": dict(tensor_parallel=2),
    "split_sequence": dict(tensor_parallel=2, split_sequence=True),
    "pipeline": dict(pipeline_parallel=2),
    "sequence": dict(sequence_parallel=2),
    "tensor x sequence": dict(tensor_parallel=2, sequence_parallel=2),
}
FEATURES = ("all weights", "lora", "gradient_checkpointing")
COMBINATIONS = [
    (plugin, precision, split, feature)
    for plugin, precision, split, feature in itertools.product(PLUGINS, PRECISIONS, SPLITS, FEATURES)
    if precision == "fp32" or plugin == "gemini" or feature != "gradient_checkpointing"  # no more to see there
]


PLAIN = ("fp32", "whole", "all weights")


def is_quick(plugin: str, *choices: str) -> bool:
    """zero1, which allows nearly everything, with everything; the others with one choice that isn't the plain one."""
    return plugin == "zero1" or sum(choice != plain for choice, plain in zip(choices, PLAIN, strict=True)) <= 1


def work(file: str, every: bool):
    """One rank: what becomes of each combination where torch says that there is a GPU; to a file.

    Args:
        every: train every combination that isn't refused, not only the quick ones.
    """
    runtime = launch(0)
    results = [outcome(runtime, *names, trained=every or is_quick(*names)) for names in COMBINATIONS]
    if runtime.is_main:
        Path(file).write_text(json.dumps(results))
    shutdown()


def outcome(runtime: Runtime, plugin: str, precision: str, split: str, feature: str, trained: bool) -> dict:
    """`refused`, the reason; or the losses of two steps, if it is to be trained; or nothing."""
    checkpointing = feature == "gradient_checkpointing"
    config = PluginConfig(plugin=plugin, precision=precision, gradient_checkpointing=checkpointing, **SPLITS[split])
    try:
        with mock.patch("torch.cuda.is_available", return_value=True):
            check_plugin(config, lora=feature == "lora")
    except UserError as error:
        return {"refused": str(error)}
    if not trained:
        return {}
    return {"losses": train(runtime, config, LoraSettings(rank=2) if feature == "lora" else None)}


def train(runtime: Runtime, config: PluginConfig, lora: LoraSettings | None) -> list[float]:
    """Two steps on the same two micro-batches on every rank."""
    torch.manual_seed(0)
    dtype = engine_class(config).loads_in(config)
    model = Actor(config=family_config("llama", 60), lora=lora, dtype=dtype)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    engine = make_engine(model, config, runtime, optimizer={}, accumulates=True)
    ids = torch.arange(3, 27).reshape(2, 12) % 50
    mask = torch.ones_like(ids, dtype=torch.bool)
    losses: list[float] = []
    for _ in range(8 if config.precision == "fp16" else 2):
        with engine.update(1e-2) as update:
            update.add(
                [ids, ids],
                lambda batch: {"input_ids": batch, "attention_mask": mask, "targets": mask},
                lambda log_probs, batch, count: cross_entropy(log_probs, mask, count),
                lambda batch: mask[:, 1:].sum(),
            )
        if update.metrics["loss"] not in losses:  # in fp16 a step may be one that only found a lower loss scale
            losses.append(update.metrics["loss"])
        if len(losses) == 2:
            break
    assert engine.skipped_steps == 0
    return losses
