"""`coati init`: a first configuration of a method, for the hardware of this machine."""

import json
import textwrap
from typing import Any

from coati.commands import COMMANDS
from coati.config import configure
from coati.config.options import is_common
from coati.config.schema import Leaf, leaves
from coati.trainers.algorithms import ALGORITHMS

# what every run must be told; these stand in its place
TO_REPLACE = {"model.path": "MODEL_FOLDER", "data.train_data": ["train.jsonl"], "output_dir": "runs/run"}
TEACHER = {"algorithm.teacher": "TEACHER_FOLDER"}
ENVIRONMENT = {"environment.path": "FILE.py:CLASS"}  # of methods that have no other use
REWARDS = {"ppo": [{"type": "model", "path": "REWARD_MODEL_FOLDER"}], "grpo": [{"type": "gsm8k"}]}
REWARDS["sdpo"] = REWARDS["grpo"]


def initial_settings(method: str) -> str:
    """The common settings of a command as YAML, each with its help."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    command = COMMANDS[method]
    config_class = ALGORITHMS[command.algorithm].config
    chosen: dict[str, Any] = {**TO_REPLACE, **for_hardware(gpus)}
    if method == "distill":
        chosen |= TEACHER
    if method == "echo":
        chosen |= ENVIRONMENT
    elif (rewards := REWARDS.get(method, REWARDS.get(command.algorithm))) is not None:
        chosen["rewards"] = rewards
    if command.defaults:
        chosen["algorithm.type"] = method
    start = f"coati {method}" if gpus < 2 else f"coati run --nproc_per_node {gpus} {method}"
    machine = {0: "a CPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs")
    lines = [f"# {command.title}, on {machine}: {start} --config FILE.yaml", "# Words in capitals are to be replaced."]
    defaults = configure(
        config_class, **{name: chosen[name] for name in ("algorithm.type", *ENVIRONMENT) if name in chosen}
    )
    section = ""
    for path, leaf in leaves(config_class, method).items():
        if not is_common(leaf.field) and path not in chosen:
            continue
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"{section}:"] if section else []
        elif not section:
            lines.append("")
        lines += entry(leaf, chosen.get(path, value_at(defaults, path)))
    return "\n".join(lines)


def for_hardware(gpus: int) -> dict[str, Any]:
    """Settings, by path, that a machine with so many GPUs can start with."""
    if gpus == 0:
        return {"batch_size": 16, "micro_batch_size": 4}
    found = {"batch_size": 64, "micro_batch_size": 4, "parallel.gradient_checkpointing": True}
    return found | {"parallel.plugin": "zero2" if gpus > 1 else "ddp"}


def value_at(config, path: str):
    """The setting of a path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def entry(leaf: Leaf, value) -> list[str]:
    """A setting's help as a comment, and the setting; one without a value is a comment too."""
    indent, name = "  " if leaf.section else "", leaf.path.rpartition(".")[2]
    is_empty = value is None or value == []
    comment = indent + "# "
    help_lines = textwrap.wrap(leaf.field.description, 110, initial_indent=comment, subsequent_indent=comment)
    return [*help_lines, f"{indent}# {name}:" if is_empty else f"{indent}{name}: {json.dumps(value)}"]
