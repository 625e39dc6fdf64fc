"""The layout of a run's folder, which checkpoints there are, and where the models in them are.

    RUN/                                what --output_dir names
      model/                            the run's product: a Hugging Face folder with its tokenizer, maybe an adapter,
                                        and a model card
      critic/                           PPO: the other finished model
      checkpoints/
        step-00000010/
          manifest.json                 step, metric, every file with its size: without it, a save was interrupted
          trainer.json                  the trainer's state
          random-0-of-2.safetensors     random states, a file per rank
          actor/                        a folder per model; of algorithms with one model, `model/`
            model/                      as the product, but with adapters unmerged
            optimizer/                  AdamW's states in shards; not of frozen models
            master-zero-1-1-1-0-of-2.safetensors   fp32 copies of low-precision weights, a file per rank
          weights/                      with generators: versions of the weights that samples ahead are made with
        step-00000020.previous/         of steps after the one that a run resumed from
        step-00000030.partial/          being written or removed: see `coati.files`
      weights/                          with generators: version-00000011.safetensors, those that are in use
      journal/                          with generators: their samples, see `coati.rollout.remote.journal`
      verdicts/                         with judges: what they said, see `coati.judges.cache`
      profile/
        step-00000003/                  of a step that was profiled: a trace and a table a rank

Logs (`metrics.jsonl`, `samples.jsonl`, `run.json`) are described in `coati.tracking.files`.
"""

import json
import math
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.files import PARTIAL, write_json

FINAL_MODEL = "model"
WEIGHTS, JOURNAL, VERDICTS = "weights", "journal", "verdicts"
LOCK = ".lock"
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer.json"
OPTIMIZER = "optimizer"

# Models by their names in trainers, checkpoints and, but for the product, beside it
ONLY_MODEL, ACTOR, CRITIC, REFERENCE, TEACHER = "model", "actor", "critic", "reference", "teacher"
_TRAINED = (ACTOR, ONLY_MODEL)
_MODEL, _PREVIOUS, _STEP = "model", ".previous", "step-"
_MODEL_FILES = ("config.json", "adapter_config.json")


# --- places


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def checkpoint_of_step(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint that is written after a step."""
    return checkpoints / f"{_STEP}{step:08d}"


def profile_of_step(run: Path, step: int) -> Path:
    """The folder of what was profiled in a step."""
    return run / "profile" / f"{_STEP}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The inverse of `checkpoint_of_step`."""
    return int(checkpoint.name.removeprefix(_STEP))


def previous_name(checkpoint: Path) -> Path:
    """What a checkpoint is renamed to that is no longer one of its run's."""
    return checkpoint.with_name(checkpoint.name + _PREVIOUS)


def model_in(checkpoint: Path, name: str) -> Path:
    """The folder of weights, config and tokenizer of one of a checkpoint's models."""
    return checkpoint / name / _MODEL


def training_state_in(checkpoint: Path, name: str) -> Path:
    """The folder with `OPTIMIZER` and the master weights of one of a checkpoint's models."""
    return checkpoint / name


def master_weights_name(layout: str, rank: int, world_size: int) -> str:
    """The file of one rank's fp32 master weights.

    Args:
        layout: how the weights are split; the file can't be used under another.
    """
    return f"master-{layout}-{rank}-of-{world_size}.safetensors"


def random_state_name(rank: int, world_size: int) -> str:
    """The file of one rank's random states."""
    return f"random-{rank}-of-{world_size}.safetensors"


# --- checkpoints that are there


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Those of all steps, complete or not, oldest first; without those set aside or being written."""
    return sorted(checkpoints.glob(_STEP + "[0-9]" * 8))


def list_complete(checkpoints: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return [folder for folder in list_checkpoints(checkpoints) if incomplete(folder) is None]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete one."""
    for folder in reversed(list_checkpoints(checkpoints)):
        if incomplete(folder) is None:
            return folder
    return None


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The complete one with the highest metric; None if none has a finite one."""
    metrics = {folder: read_manifest(folder)["metric"] for folder in list_complete(checkpoints)}
    scored = [folder for folder, metric in metrics.items() if metric is not None and math.isfinite(metric)]
    return max(scored, key=lambda folder: metrics[folder], default=None)


def incomplete(checkpoint: Path) -> str | None:
    """Why a folder is not a complete checkpoint; None if it is."""
    if not checkpoint.is_dir():
        return "no such folder"
    if checkpoint.suffix == PARTIAL or not (checkpoint / MANIFEST).exists():
        return f"{MANIFEST} is missing: the save was interrupted"
    try:
        files = dict(read_manifest(checkpoint)["files"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, size in files.items():
        if not (checkpoint / name).exists():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} has {(checkpoint / name).stat().st_size} bytes instead of {size}"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """`{"step": int, "metric": float | None, "files": {path: bytes}}`; the best checkpoint has the highest metric."""
    return json.loads((checkpoint / MANIFEST).read_text())


def write_manifest(checkpoint: Path, step: int, metric: float | None):
    """Lists a checkpoint's files, all of which are there."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}
    write_json(checkpoint / MANIFEST, {"step": step, "metric": metric, "files": files})


# --- models that are there


def find_model(place: Path) -> Path | None:
    """The Hugging Face folder that a path names: that folder itself, or one in a run or in a checkpoint.

    Of a run it is the product, else the trained model of the newest complete checkpoint; None if there is no model.
    """
    inside = [place / FINAL_MODEL, *(model_in(place, name) for name in _TRAINED)]
    for folder in (place, *inside):
        if any((folder / name).is_file() for name in _MODEL_FILES):
            return folder
    newest = newest_checkpoint(checkpoints_of(place))
    return None if newest is None else find_model(newest)


def model_folder(path: str | Path, setting: str = "") -> Path:
    """The folder that transformers opens: `path` itself, or the finished model or the newest complete checkpoint of a
    coati run.

    Args:
        setting: that the path comes from, for errors.

    Raises:
        UserError: there is none in it.
    """
    named = f"{setting} {path}".strip()
    if not Path(path).is_dir():
        raise UserError(f"{named} is no folder; models are read from folders, nothing is downloaded")
    folder = find_model(Path(path))
    if folder is None:
        names = sorted(entry.name for entry in Path(path).iterdir())
        found = ", ".join(names[:6] + (["..."] if len(names) > 6 else [])) or "nothing"
        raise UserError(
            f"{named} holds neither config.json nor adapter_config.json, nor a finished coati run, "
            f"nor coati checkpoints that are complete; in it: {found}"
        )
    return folder


def names_of(paths: list[str]) -> list[str]:
    """A short name per model: the folder's own, or the whole path where two would be the same."""
    short = [Path(path).resolve().name for path in paths]
    return [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def named_models(models: list[str]) -> dict[str, str]:
    """Paths by name. `NAME=MODEL` names one; others have their folders' names.

    Raises:
        UserError: two of the same name.
    """
    pairs = [model.partition("=") if "=" in model and not Path(model).exists() else ("", "", model) for model in models]
    short = names_of([path for _, _, path in pairs])
    names = [name or default for (name, _, _), default in zip(pairs, short, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name}: name them, as in first=FOLDER second=FOLDER")
    return {name: path for name, (_, _, path) in zip(names, pairs, strict=True)}
