"""The options of a run's logging, and who the current process is."""

from __future__ import annotations

import os
from typing import Literal

from coati.config import Settings, option, settings


@settings
class TrackingConfig(Settings):
    """Where metrics and samples go besides the run folder, and what the terminal shows."""

    wandb: Literal["online", "offline", "disabled"] = option(
        "disabled",
        "Weights & Biases: online, offline (kept in the run folder for `wandb sync`) or disabled.",
        common=True,
    )
    wandb_project: str = option("coati", "The Weights & Biases project.")
    run_name: str | None = option(None, "The run's name; the run folder's name if absent.")
    tensorboard: bool = option(False, "Also write TensorBoard event files to RUN_DIR/tensorboard.")
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "bar, plain (a line now and then), off, or auto: a bar on a terminal, plain elsewhere."
    )


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size: from torch.distributed, else from the launcher's variables."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
