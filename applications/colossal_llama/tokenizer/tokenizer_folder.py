"""Folders with a tokenizer: reading the kinds that can be extended, and writing the extended one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError
from colossal_llama.tokenizer.vocabulary import Vocabulary

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
# Rewritten, or (tiktoken's) not known to be readable by anything that reads tokenizer.json.
REPLACED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass
class TokenizerFolder:
    """A tokenizer that can be extended: `vocabulary`, and `model`, its sentencepiece `ModelProto` or None."""

    path: Path
    vocabulary: Vocabulary
    model: Any


def open_tokenizer(path: str) -> TokenizerFolder:
    """Read a tokenizer folder.

    Raises:
        UserError: the folder is missing, has no tokenizer, or one that is not byte-level or sentencepiece BPE.
    """
    folder = Path(path)
    if not path or not folder.is_dir():
        raise UserError(f"The tokenizer folder {path!r} does not exist; correct --tokenizer.")
    sentencepiece = folder / "tokenizer.model"
    spec = _read_spec(folder)
    _check_kind(spec, folder)
    byte_level = is_byte_level(spec)
    model = None
    if sentencepiece.exists() and not byte_level:
        from colossal_llama.tokenizer.sentencepiece_model import read_model

        model = read_model(sentencepiece)
    return TokenizerFolder(folder, Vocabulary(spec, byte_level), model)


def load_tokenizer(folder: str | Path):
    """transformers' tokenizer of a folder; nothing is downloaded, no code from the folder runs.

    Raises:
        UserError: transformers cannot read it, or it is none of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"The tokenizer folder {folder} does not exist (looked in {Path.cwd()}); correct the path.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # What is raised for broken files of so many kinds is documented nowhere.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{folder} holds no tokenizer that transformers can load ({reason}).") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer in {folder} ({type(tokenizer).__name__}) gives no character offsets; use a fast one "
            "(a tokenizer.json made with the `tokenizers` library)."
        )
    return tokenizer


def _read_spec(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.exists():
        return json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    try:
        spec = json.loads(path.read_bytes())
    except ValueError:
        spec = None
    if not isinstance(spec, dict) or not spec.get("model") or not isinstance(spec["model"], dict):
        raise UserError(f"{path} is not a file of the tokenizers library; write it again.")
    return spec


def load_backend(folder: str | Path):
    """The folder's `tokenizers.Tokenizer`, whatever class transformers would wrap it in.

    Raises:
        UserError: there is none.
    """
    from tokenizers import Tokenizer

    if not Path(folder).is_dir():
        raise UserError(f"The tokenizer folder {str(folder)!r} does not exist; correct the path.")
    tokenizer = Tokenizer.from_str(json.dumps(_read_spec(Path(folder))))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` represents bytes by letters, as GPT-2's."""
    return '"ByteLevel"' in json.dumps([spec.get("pre_tokenizer"), spec.get("normalizer")])


def _check_kind(spec: dict[str, Any], folder: Path) -> None:
    model = spec["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise UserError(f"{folder} has a {kind} tokenizer; only BPE tokenizers can be extended.")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise UserError(f"{folder} has a BPE tokenizer with {setting}, which can't be extended; choose another.")
    if not is_byte_level(spec) and not model.get("byte_fallback"):
        raise UserError(
            f"{folder} has a BPE tokenizer that is neither byte-level (GPT-2, Llama-3, Qwen) nor has byte fallback "
            "(Llama-2, Mistral, Gemma); others can't be extended."
        )


def write_tokenizer(source: TokenizerFolder, vocabulary: Vocabulary, output: Path) -> list[str]:
    """Write the extended tokenizer with all the source's other files but weights; returns the names left out."""
    left_out = []
    for file in sorted(source.path.iterdir()):
        if file.name in REPLACED or file.name.endswith(WEIGHTS):
            continue
        if file.suffix in (".tiktoken", ".model"):
            left_out.append(file.name)
        elif file.is_dir():
            if file.name == "additional_chat_templates":
                shutil.copytree(file, output / file.name)
        else:
            shutil.copyfile(file, output / file.name)
    spec = vocabulary.spec()
    _write_json(output / "tokenizer.json", spec)
    if (source.path / "vocab.json").exists():
        _write_json(output / "vocab.json", spec["model"]["vocab"])
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        (output / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    if source.model is not None:
        from colossal_llama.tokenizer.sentencepiece_model import extend_model

        (output / "tokenizer.model").write_bytes(extend_model(source.model, vocabulary))
    elif (source.path / "tokenizer.model").exists():
        left_out.append("tokenizer.model")
    return left_out


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
