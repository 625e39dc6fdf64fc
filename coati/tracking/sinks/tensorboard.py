"""TensorBoard."""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard import SummaryWriter

from coati.tracking.config import Status
from coati.tracking.sinks.base import RunInfo
from coati.tracking.sinks.tables import text_of


class TensorBoardSink:
    """Event files in `tensorboard/`, online or not; on resume the steps after the resumed one are purged. They have no
    place for settings or for how a run ended."""

    def __init__(self, run: RunInfo) -> None:
        purge_step = 0 if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        # Four spaces make a Markdown code block, in which a response's own marks stay text.
        blocks = ["\n".join("    " + line for line in text_of(row).splitlines()) for row in rows]
        self._writer.add_text(name, "\n\n---\n\n".join(blocks), step)

    def finish(self, status: Status) -> None:
        self._writer.close()
