"""The options of a run's logging, and who the current process is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from coati.config import ListOf, Settings, option, settings
from coati.errors import UserError

TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio", "swanlab"]
Status = Literal["finished", "interrupted", "failed"]


@settings
class TrackingConfig(Settings):
    """Where metrics and samples go besides the run folder, and what the terminal shows."""

    trackers: ListOf[TrackerName] = option(
        (),
        "where metrics and samples go besides the run folder: wandb, tensorboard, mlflow, trackio, swanlab",
        common=True,
    )
    tracking_mode: Literal["online", "offline"] = option(
        "online", "online: the trackers' servers are told at once; offline: kept on this machine, see docs/tracking.md"
    )
    project: str = option("coati", "the project that trackers show the run in")
    run_name: str | None = option(None, "the run's name; that of the run folder if not given")
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "bar, plain (a line now and then), off, or auto: a bar on a terminal, plain elsewhere"
    )

    profile_steps: ListOf[Annotated[int, Field(ge=1)]] = option(
        (), "steps that are profiled, counted from 1, see docs/tracking.md"
    )

    def problems(self) -> Iterator[str]:
        if twice := sorted({name for name in self.trackers if self.trackers.count(name) > 1}):
            yield f"trackers names {', '.join(twice)} twice: once is enough"

    def check_profile_steps(self, total_steps: int):
        """Raises a UserError for steps that the run does not have."""
        if beyond := [step for step in self.profile_steps if step > total_steps]:
            raise UserError(f"profile_steps has {', '.join(map(str, beyond))}, but the run ends at step {total_steps}")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the world size: from torch.distributed, else from the launcher's variables."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
