"""The options of a run's logging, and who the current process is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from coati.config import Settings, option
from coati.errors import UserError

TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio", "swanlab"]
Status = Literal["finished", "interrupted", "failed"]


@dataclass
class TrackingConfig(Settings):
    """Where metrics and samples go besides the run folder, and what the terminal shows."""

    trackers: list[TrackerName] = option(
        (),
        "where metrics and samples go besides the run folder: wandb, tensorboard, mlflow, trackio, swanlab",
        common=True,
    )
    tracking_mode: Literal["online", "offline"] = option(
        "online", "online: the trackers' servers are told at once; offline: kept on this machine, see docs/tracking.md"
    )
    project: str = option("coati", "the project that trackers show the run in")
    run_name: str | None = option(None, "The run's name; the run folder's name if absent.")
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "bar, plain (a line now and then), off, or auto: a bar on a terminal, plain elsewhere."
    )

    def __post_init__(self):
        super().__post_init__()
        if twice := sorted({name for name in self.trackers if self.trackers.count(name) > 1}):
            raise UserError(f"trackers names {', '.join(twice)} twice: once is enough")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size: from torch.distributed, else from the launcher's variables."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
