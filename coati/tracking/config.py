"""The options of a run's logging, and who the current process is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrackingConfig:
    """Where metrics and samples go besides the run folder, and what the terminal shows."""

    wandb: Literal["online", "offline", "disabled"] = field(
        default="disabled",
        metadata={"help": "Weights & Biases: online, offline (kept in the run folder for `wandb sync`) or disabled."},
    )
    wandb_project: str = field(default="coati", metadata={"help": "The Weights & Biases project."})
    run_name: str | None = field(default=None, metadata={"help": "The run's name; the run folder's name if absent."})
    tensorboard: bool = field(
        default=False, metadata={"help": "Also write TensorBoard event files to RUN_DIR/tensorboard."}
    )
    progress: Literal["auto", "bar", "plain", "off"] = field(
        default="auto",
        metadata={"help": "bar, plain (a line now and then), off, or auto: a bar on a terminal, plain elsewhere."},
    )


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size: from torch.distributed, else from the launcher's variables."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
