"""Saves fail at a run's end, when its training is lost with them: what can be tried of them is tried at its start."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from coati.errors import UserError
from coati.parallel import Engine

OPTIMIZER_BYTES = 8  # of a trained weight: AdamW's two averages
MASTER_BYTES = 4  # and its fp32 copy, where it is trained in low precision


def try_saving(output: Path, engines: Mapping[str, Engine], tokenizer, merge: bool):
    """Writes all but the weights of these models into a folder in `output`, which is removed.

    Raises:
        UserError: something of a model can't be saved.
    """
    with tempfile.TemporaryDirectory(prefix=".first-save-", dir=output) as place:
        for name, engine in engines.items():
            folder = Path(place) / name
            folder.mkdir()
            try:
                engine.whole.try_saving(folder, merge)
                tokenizer.save_pretrained(str(folder))
            except UserError:
                raise
            except Exception as error:  # whatever it is, it would come again after the last step
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"the {name} could not be saved at the end of this run: {reason}") from error


def check_room(output: Path, checkpoint: int, export: int):
    """Compares the bytes of a checkpoint and of the final models with what is free.

    Raises:
        UserError: there is too little room.
    """
    free = shutil.disk_usage(output).free
    if free < checkpoint + export:
        raise UserError(
            f"{output} has {free / 1e9:.3g} GB free, and this run needs {(checkpoint + export) / 1e9:.3g} GB (a "
            f"checkpoint {checkpoint / 1e9:.3g}, the final model {export / 1e9:.3g}): make room, or give another "
            "--output_dir"
        )


def checkpoint_bytes(engine: Engine) -> int:
    """What a model and its optimizer take in a checkpoint."""
    of_weights = (engine.trained_parameters if engine.module.has_adapter else engine.parameters) * _width(engine)
    of_training = OPTIMIZER_BYTES + (0 if _is_fp32(engine) else MASTER_BYTES)
    return of_weights + engine.trained_parameters * of_training


def export_bytes(engine: Engine, merge: bool, dtype: torch.dtype | None) -> int:
    """What a model takes as the run's product."""
    if engine.module.has_adapter and not merge:
        return engine.trained_parameters * _width(engine)
    whole = engine.parameters - (engine.trained_parameters if engine.module.has_adapter else 0)
    return whole * (_width(engine) if dtype is None else dtype.itemsize)


def _is_fp32(engine: Engine) -> bool:
    return engine.loads_in(engine.config) == torch.float32


def _width(engine: Engine) -> int:
    """Bytes of a weight in the model's state."""
    return 4 if engine.averages else engine.loads_in(engine.config).itemsize
