"""Gives a model the rows for an extended tokenizer's new tokens, as means of the rows it has.

`python applications/colossal_llama/init_model.py --model FOLDER --tokenizer EXTENDED --output FOLDER`

Padding rows (`--pad_to_multiple_of`) have no token. Nothing in the weights of a head without bias makes a row's logit
low for every input, so their ids are listed in `generation_config.json` as `suppress_tokens`, which `generate` of
transformers obeys; where a head has a bias, theirs is -10,000.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from coati.config import Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from coati.tracking.files import read_object
from colossal_llama.output_folder import new_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@settings
class InitConfig(Settings):
    """Settings of `init_model`."""

    model: str = option("", "folder of the model: config.json and safetensors files", path="model")
    tokenizer: str = option("", "folder of the extended tokenizer", path="model")
    output: str = option("", "folder of the model with new rows; must not exist", path="output")
    old_tokenizer: str | None = option(
        None, "folder of the model's tokenizer, unless it is in the model's folder", path="model"
    )
    rule: Literal["mean", "original", "random"] = option(
        "mean", "new rows: mean of the text's old pieces, the mean as Colossal-LLaMA-2 took it, or normal noise"
    )
    pad_to_multiple_of: int = option(1, "round the number of rows up to a multiple, such as 64")
    seed: int = option(0, "of the random rule", ge=0)
    progress: Literal["auto", "bar", "plain", "off"] = option("auto", "what the terminal shows meanwhile")


def init_model(config: InitConfig) -> dict[str, int]:
    """Write the model; returns `{"old_rows", "new_tokens", "rows", "suppressed"}`.

    The memory needed is that of one embedding; other tensors are copied from file to file.

    Raises:
        UserError: a folder is not what it should be, the tokenizers don't fit each other or the model.
    """
    from colossal_llama.model.token_rows import RowPlan, find_token_tensors, token_sources
    from colossal_llama.tokenizer.tokenizer_folder import load_backend

    if config.pad_to_multiple_of < 1:
        raise UserError(f"--pad_to_multiple_of is {config.pad_to_multiple_of}; give 1 or more.")
    source = Path(config.model)
    with new_folder(config.output) as folder:
        files = weight_files(source)
        tensors = find_token_tensors(source, set(files))
        old, new = load_backend(config.old_tokenizer or source), load_backend(config.tokenizer)
        kept, tokens = _check_ids(old.get_vocab(), new.get_vocab())
        rows = _rows(files[tensors.embedding], tensors.embedding)
        if rows < kept:
            raise UserError(f"{source} has {rows} embedding rows and its tokenizer {kept} ids; give --old_tokenizer.")
        sources = token_sources(old, new, config.rule)
        unused = {token: [token] for token in range(kept, rows) if token not in sources}
        size = math.ceil(max(rows, tokens) / config.pad_to_multiple_of) * config.pad_to_multiple_of
        plan = RowPlan(kept, size, unused | sources, config.rule == "random", config.seed)
        print(f"{source}: {rows} rows -> {size} for {len(sources)} new tokens ({config.rule}), to {config.output}")
        _write_weights(files, tensors, plan, folder, config)
        suppressed = sorted(set(range(kept, size)) - set(sources))
        _write_rest(source, Path(config.tokenizer), folder, size)
        _suppress(folder, suppressed, set(sources))
        _check_shapes(folder, tensors)
    return {"old_rows": rows, "new_tokens": len(sources), "rows": size, "suppressed": len(suppressed)}


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor names and the safetensors file of the folder that holds each.

    Raises:
        UserError: there are no safetensors weights, or the index is broken or names a missing file.
    """
    from colossal_llama.model.safetensors_copy import read_header

    if not folder.is_dir():
        raise UserError(f"The model folder {str(folder)!r} does not exist; correct --model.")
    names = [SINGLE]
    if (folder / INDEX).exists():
        index = read_object(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; save the model again.")
        names = sorted(set(index.values()))
    elif not (folder / SINGLE).exists():
        raise UserError(f"{folder} has no {SINGLE} or {INDEX}; save the model as safetensors.")
    files = {}
    for path in (folder / name for name in names):
        files |= {tensor: path for tensor in read_header(path)[0] if tensor != "__metadata__"}
    return files


def _rows(path: Path, name: str) -> int:
    from colossal_llama.model.safetensors_copy import read_header

    return read_header(path)[0][name]["shape"][0]


def _check_ids(old: dict[str, int], new: dict[str, int]) -> tuple[int, int]:
    """How many ids the old and the new tokenizer use."""
    kept = max(old.values()) + 1
    for piece, token in old.items():
        if new.get(piece) != token:
            raise UserError(
                f"{piece!r} is id {token} in the model's tokenizer and {new.get(piece)} in the extended one; "
                "give the tokenizer that was made from the model's."
            )
    taken = [piece for piece, token in new.items() if token < kept and piece not in old]
    if taken:
        raise UserError(f"The extended tokenizer gives {taken[0]!r} an id below {kept}; new ids must follow the old.")
    return kept, max(new.values()) + 1


def _write_weights(files: dict[str, Path], tensors, plan, folder: Path, config: InitConfig) -> None:
    from safetensors import safe_open

    from coati.tracking.config import TrackingConfig
    from coati.tracking.progress import progress_bar
    from colossal_llama.model.safetensors_copy import NewRows, copy_file

    dropped = {tensors.head} if tensors.tied and tensors.head else set()
    paths = sorted(set(files.values()))
    with progress_bar(len(paths), "files", TrackingConfig(progress=config.progress)) as bar:
        for path in paths:
            changed = {}
            with safe_open(path, framework="pt") as weights:
                for name in tensors.changed():
                    if files[name] == path:
                        blocks = plan.blocks(weights.get_tensor(name), is_bias=name == tensors.bias)
                        changed[name] = NewRows(plan.kept, plan.size - plan.kept, blocks)
                copy_file(path, folder / path.name, changed, dropped)
            bar.advance()
    if paths[0].name != SINGLE:
        index = read_object(paths[0].parent / INDEX)
        index["weight_map"] = {name: path.name for name, path in files.items() if name not in dropped}
        index.setdefault("metadata", {})["total_size"] = sum(_data_size(folder / path.name) for path in paths)
        index["metadata"].pop("total_parameters", None)
        _write_json(folder / INDEX, index)


def _data_size(path: Path) -> int:
    from colossal_llama.model.safetensors_copy import read_header

    return path.stat().st_size - read_header(path)[1]


def _write_rest(source: Path, tokenizer: Path, folder: Path, size: int) -> None:
    """The config with the new size, the tokenizer's files, and whatever else the model has."""
    from colossal_llama.tokenizer.tokenizer_folder import REPLACED, WEIGHTS

    settings = read_object(source / "config.json")
    holder = settings if "vocab_size" in settings else settings.get("text_config", settings)
    holder["vocab_size"] = size
    for origin, but in ((source, REPLACED), (tokenizer, ("config.json", "generation_config.json"))):
        for file in origin.iterdir():
            if file.is_file() and file.name not in but and not file.name.endswith(WEIGHTS):
                shutil.copyfile(file, folder / file.name)
            elif file.name == "additional_chat_templates":
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
    _write_json(folder / "config.json", settings)


def _suppress(folder: Path, unused: list[int], new: set[int]) -> None:
    """Lists the ids without a token in the generation config. Those that have become tokens leave the list, on which an
    earlier extension may have put them; what somebody else has put there stays."""
    from transformers import AutoConfig, GenerationConfig

    path = folder / "generation_config.json"
    if unused and not path.exists():
        GenerationConfig.from_model_config(AutoConfig.from_pretrained(str(folder))).save_pretrained(str(folder))
    if not path.exists():
        return
    generation = read_object(path)
    before = generation.get("suppress_tokens") or []
    now = sorted({*(token for token in before if token not in new), *unused})
    if now != before:
        generation["suppress_tokens"] = now
        _write_json(path, generation)


def _check_shapes(folder: Path, before) -> None:
    """Every tensor of the result has the shape that transformers expects by the new config."""
    from colossal_llama.model.safetensors_copy import read_header
    from colossal_llama.model.token_rows import find_token_tensors

    files = weight_files(folder)
    expected = find_token_tensors(folder, set(files)).shapes
    for name, path in files.items():
        shape = read_header(path)[0][name]["shape"]
        if name in expected and expected[name] != shape:
            raise UserError(
                f"{name} has shape {shape} and by the new vocab_size should have {expected[name]} (before: "
                f"{before.shapes.get(name)}); models with other tensors per token can't be extended."
            )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        done = init_model(parse_config(InitConfig, argv, "Give a model rows for an extended tokenizer"))
        print("{old_rows} rows -> {rows}, {new_tokens} new tokens, {suppressed} ids suppressed".format(**done))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
