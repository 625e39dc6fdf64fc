"""`coati init`: a first configuration of a method, for the hardware of this machine."""

import dataclasses
import json
import textwrap
from typing import Any

from coati.commands import COMMANDS
from coati.trainers.algorithms import ALGORITHMS

# what every run must be told; these stand in its place
TO_REPLACE = {"model": "MODEL_FOLDER", "train_data": ["train.jsonl"], "output_dir": "runs/run"}
REWARD = {"ppo": {"reward_model": "REWARD_MODEL_FOLDER"}, "grpo": {"verifiers": ["math"]}}


def initial_settings(method: str) -> str:
    """The common settings of a command as YAML, each with its help."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    command = COMMANDS[method]
    config_class = ALGORITHMS[command.algorithm].config
    chosen = {**TO_REPLACE, **REWARD.get(command.algorithm, {}), **for_hardware(gpus), **command.defaults}
    start = f"coati {method}" if gpus < 2 else f"coati run --nproc_per_node {gpus} {method}"
    machine = {0: "a CPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs")
    lines = [f"# {command.title}, on {machine}: {start} --config FILE.yaml", "# Words in capitals are to be replaced."]
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in TO_REPLACE):
        if "common" in field.metadata or field.name in chosen:
            lines += ["", *entry(field, chosen)]
    return "\n".join(lines)


def for_hardware(gpus: int) -> dict[str, Any]:
    """Settings that a machine with so many GPUs can start with."""
    if gpus == 0:
        return {"batch_size": 16, "micro_batch_size": 4}
    plugin = "zero2" if gpus > 1 else "ddp"
    return {"plugin": plugin, "batch_size": 64, "micro_batch_size": 4, "gradient_checkpointing": True}


def entry(field: dataclasses.Field, chosen: dict[str, Any]) -> list[str]:
    """A setting's help as a comment, and the setting; one without a value is a comment too."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    value = chosen.get(field.name, default)
    is_empty = value is None or value == []
    comment = textwrap.wrap(field.metadata["help"], 110, initial_indent="# ", subsequent_indent="# ")
    return [*comment, f"# {field.name}:" if is_empty else f"{field.name}: {json.dumps(value)}"]
