"""The folder of a run: whose it is, what it resumes from, checkpoints, and the finished models."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coati.errors import UserError
from coati.files import sync, write_json
from coati.models.base import stored_dtype
from coati.models.lora import base_of_adapter, is_adapter
from coati.parallel import Checkpoints, Engine, Runtime
from coati.parallel.checkpoint import atomic_write_by_all
from coati.parallel.engine import DTYPES
from coati.run_layout import (
    FINAL_MODEL,
    LOCK,
    TRAINER_STATE,
    checkpoints_of,
    list_checkpoints,
    model_in,
    training_state_in,
)
from coati.tracking import read_metrics
from coati.tracking.files import RUN, to_json
from coati.trainers.config import TrainerConfig
from coati.trainers.first_save import check_room, checkpoint_bytes, export_bytes, try_saving
from coati.trainers.resume import changed_settings, lines_of, refuse_other_models, said


class RunFolder:
    """The output folder, locked against other runs until `release`.

    Args:
        algorithm: that a checkpoint must be of.

    Attributes:
        resumed_from: the checkpoint that the run goes on from; None for a new run.
        stored: what that checkpoint's trainer.json says; empty for a new run.

    Raises:
        UserError: another run writes there, or has left work there and `resume` is never; it can't be written; the
            checkpoint is another algorithm's, or its weights can't go on under these settings.
    """

    def __init__(self, config: TrainerConfig, runtime: Runtime, algorithm: str):
        self.config, self.runtime, self.algorithm = config, runtime, algorithm
        self.path = Path(config.output_dir)
        self.checkpoints = Checkpoints(checkpoints_of(self.path), runtime, config.checkpoints.keep_checkpoints)
        self.lock = None
        if runtime.is_main:
            self._make()
            self.lock = lock_folder(self.path)
        try:
            self.resumed_from = self._find_resume()
            self.stored = self._read_stored()
        except BaseException:
            self.release()
            raise

    def release(self):
        """Lets other runs write to the folder."""
        if self.lock is not None:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()

    def model_in_checkpoint(self, name: str) -> Path | None:
        """The folder of a model in the checkpoint that the run resumes from."""
        return model_in(self.resumed_from, name) if self.resumed_from else None

    @property
    def product(self) -> Path:
        """The folder of the finished model."""
        return self.path / FINAL_MODEL

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint tells, as JSON has them."""
        return json.loads(to_json(said(self.config)))

    # --- saving

    def try_saving(self, engines: Mapping[str, Engine], frozen: Mapping[str, Engine], tokenizer):
        """Raises a UserError for what would fail at the end: models that can't be saved, too little room."""
        if not self.runtime.is_main:
            return
        merge, everything = self.config.export.merge_lora, {**engines, **frozen}
        try_saving(self.path, everything, tokenizer, merge)
        checkpoint = sum(checkpoint_bytes(engine) for engine in everything.values())
        export = sum(export_bytes(engine, merge, self._export_dtype(engine)) for engine in engines.values())
        check_room(self.path, checkpoint, export)

    def save_checkpoint(
        self,
        step: int,
        engines: Mapping[str, Engine],
        frozen: Mapping[str, Engine],
        tokenizer,
        state: dict[str, Any],
        score: float | None,
        save_files: Callable[[Path], None],
    ):
        """Writes a checkpoint on all ranks.

        Args:
            state: what goes into trainer.json.
            score: tells the best checkpoint; higher is better.
            save_files: writes further files into the folder.
        """

        def write(folder: Path):
            for name, engine in engines.items():
                self._write_model(engine, tokenizer, model_in(folder, name))
                engine.save_optimizer(training_state_in(folder, name))
            for name, engine in frozen.items():
                self._write_model(engine, tokenizer, model_in(folder, name))
            save_files(folder)
            if self.runtime.is_main:
                write_json(folder / TRAINER_STATE, state)

        self.checkpoints.save(step, write, score)

    def export(self, engines: Mapping[str, Engine], tokenizer, card: Callable[[str], str]):
        """The finished models as HF folders, written aside and renamed.

        Args:
            card: gives the README.md of a model by its name; called on rank 0.
        """
        for i, (name, engine) in enumerate(engines.items()):
            target = self.path / (FINAL_MODEL if i == 0 else name)
            with atomic_write_by_all(target, self.runtime) as aside:
                self._write_model(engine, tokenizer, aside, self.config.export.merge_lora, self._export_dtype(engine))
                if self.runtime.is_main:
                    (aside / "README.md").write_text(card(name), encoding="utf-8")  # peft has written one of its own
        self.runtime.communicator.barrier()
        self.runtime.say(f"{self.algorithm}: finished, the model is in {self.product}")

    def _write_model(
        self, engine: Engine, tokenizer, folder: Path, merge: bool = False, dtype: torch.dtype | None = None
    ):
        state = engine.state_dict()
        if self.runtime.is_main:
            folder.mkdir(parents=True)
            engine.whole.save_pretrained(folder, state, merge, dtype)
            tokenizer.save_pretrained(str(folder))
            sync(folder)

    def _export_dtype(self, engine: Engine) -> torch.dtype | None:
        """Of the final model's weights; None to leave them as they are."""
        c = self.config
        if c.export.export_dtype != "auto":
            return DTYPES[c.export.export_dtype]
        if c.model.path is None:
            return None
        own = stored_dtype(base_of_adapter(c.model.path) if is_adapter(c.model.path) else c.model.path)
        return own if own is not None and own.itemsize <= engine.loads_in(c.parallel).itemsize else None

    # --- opening

    def _make(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written ({error.strerror}): name another") from error

    def _find_resume(self) -> Path | None:
        found = None
        if self.config.checkpoints.resume == "never":
            if self.runtime.communicator.any(self.runtime.is_main and holds_work(self.path)):
                raise UserError(
                    f"{self.path} already contains a run: use --resume auto to continue, or another --output_dir"
                )
        else:
            found = self.checkpoints.find(self.config.checkpoints.resume)
        return self.runtime.communicator.broadcast(found)

    def _read_stored(self) -> dict[str, Any]:
        """Says which settings are others now."""
        if self.resumed_from is None:
            return {}
        stored = json.loads((self.resumed_from / TRAINER_STATE).read_text())
        if stored["algorithm"] != self.algorithm:
            raise UserError(f"{self.resumed_from} is a checkpoint of {stored['algorithm']}, not of {self.algorithm}")
        changed = changed_settings(stored.get("settings", {}), self.settings)
        refuse_other_models(changed, self.resumed_from)
        for line in lines_of(changed):
            self.runtime.say(line)
        # the first checkpoints held no count of rows
        return {"rows": stored["step"] * self.config.batch_size} | stored


def holds_work(output: Path) -> bool:
    """Whether a run has left more in its folder than what it writes before its first step."""
    if not (output / RUN).exists():
        return False
    saved = (output / FINAL_MODEL).exists() or list_checkpoints(checkpoints_of(output))
    return bool(saved) or any(row["step"] > 0 for row in read_metrics(output))


def lock_folder(folder: Path):
    """A lock on a run's folder, held until it is released or this process ends; None where the file system has none.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another run is writing to {folder}: wait for its end, or name another folder with --output_dir"
        ) from error
    except (OSError, NotImplementedError):  # some network file systems can't lock
        return None
    return lock
