"""Where a tracker's metrics and samples go: JSON lines, Weights & Biases, TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.tracking.config import TrackingConfig
from coati.tracking.files import METRICS, SAMPLES, drop_after, to_json

_EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 255}


class JsonlSink:
    """`metrics.jsonl` and `samples.jsonl`, flushed at each call: a crash loses at most the last line."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        for name in (METRICS, SAMPLES):
            path = run_dir / name
            if resume_step is not None:
                drop_after(path, resume_step)
            elif path.exists():
                path.replace(run_dir / f"{path.stem}.previous.jsonl")
        # Open until `finish`.
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._samples = open(run_dir / SAMPLES, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._metrics.write(to_json({"step": step, "time": time.time(), **metrics}) + "\n")
        self._metrics.flush()

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        self._samples.writelines(to_json({"step": step, "name": name, **row}) + "\n" for row in rows)
        self._samples.flush()

    def finish(self, status: str) -> None:
        self._metrics.close()
        self._samples.close()


class WandbSink:
    """A Weights & Biases run. Resumed under its id, W&B itself ignores the steps that it has already seen."""

    def __init__(
        self, run_dir: Path, config: TrackingConfig, run_id: str, algorithm: str, settings: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb is not installed; `pip install wandb`, or set the option wandb to disabled."
            ) from None
        self._wandb = wandb
        try:
            self._run = wandb.init(
                mode=config.wandb,
                project=config.wandb_project,
                name=config.run_name or run_dir.resolve().name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                config=settings,
                job_type=algorithm,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"wandb could not start ({reason}); run `wandb login`, or set the option wandb to offline."
            ) from error
        if config.wandb == "online":
            print(f"wandb: {self._run.url}", file=sys.stderr)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        # Two rows may hold 1 and 0.5 in one column, or a number and none: W&B's type check refuses that.
        table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self._run.log({name: table}, step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=_EXIT_CODES[status])


class TensorBoardSink:
    """TensorBoard event files in `tensorboard/`; on resume the steps after the resumed one are purged."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is not installed; `pip install tensorboard`, or turn the option tensorboard off."
            ) from None
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, rows: list[dict[str, Any]], step: int, name: str) -> None:
        # Four spaces make a Markdown code block, in which a response's own marks stay text.
        texts = ["\n".join(f"{key}: {value}" for key, value in row.items()) for row in rows]
        blocks = ["\n".join("    " + line for line in text.splitlines()) for text in texts]
        self._writer.add_text(name, "\n\n---\n\n".join(blocks), step)

    def finish(self, status: str) -> None:
        self._writer.close()
