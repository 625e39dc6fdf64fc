"""Fetches tokenizers of published models with pip, for `tokenizer_report`.

`python applications/colossal_llama/real_tokenizers.py --output runs/tokenizers`

llama-cpp-python's source package has the vocabularies of LLaMA-2, Baichuan-7B, Llama-3, Qwen2, DeepSeek and GPT-2 as
GGUF files, and mistral-common Mistral-7B's `tokenizer.model`. The `gguf` package, which reads the former, is put into a
temporary folder; nothing is installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from coati.config import Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from colossal_llama.output_folder import new_folder

GGUF, LLAMA, MISTRAL = "gguf==0.19.0", "llama-cpp-python==0.3.36", "mistral-common==1.13.1"
SENTENCEPIECE = {"LLaMA-2": "llama-spm", "Baichuan-7B": "baichuan"}
BYTE_LEVEL = {"Llama-3": "llama-bpe", "Qwen2": "qwen2", "DeepSeek-LLM": "deepseek-llm", "GPT-2": "gpt-2"}
CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@settings
class FetchConfig(Settings):
    """Settings of `real_tokenizers`."""

    output: str = option("", "folder to put a folder for each tokenizer into; must not exist", path="output")


def fetch(config: FetchConfig) -> None:
    """Download the packages and write the tokenizers.

    Raises:
        UserError: pip cannot get a package.
    """
    with new_folder(config.output) as folder, tempfile.TemporaryDirectory() as scratch:
        packages = Path(scratch)
        print(f"downloading 83 MB with pip into {config.output}", flush=True)
        _pip("install", "--no-deps", "--target", str(packages / "lib"), GGUF)
        _pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", scratch, LLAMA)
        _pip("download", "--no-deps", "--dest", scratch, MISTRAL)
        with zipfile.ZipFile(next(packages.glob("mistral_common-*.whl"))) as wheel:
            _write_sentencepiece(folder / "Mistral-7B", wheel.read("mistral_common/data/tokenizer.model.v1"))
        with tarfile.open(next(packages.glob("llama_cpp_python-*.tar.gz"))) as source:
            for member in source:
                if Path(member.name).name.startswith("ggml-vocab-") and member.name.endswith(".gguf"):
                    with (packages / Path(member.name).name).open("wb") as file:
                        shutil.copyfileobj(source.extractfile(member), file)
        sys.path.insert(0, str(packages / "lib"))
        for name, vocabulary in SENTENCEPIECE.items():
            _write_sentencepiece(folder / name, _model_of(packages / f"ggml-vocab-{vocabulary}.gguf"))
        for name, vocabulary in BYTE_LEVEL.items():
            _write_byte_level(folder / name, packages / f"ggml-vocab-{vocabulary}.gguf")


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1]
        raise UserError(f"pip {words[0]} {words[-1]} failed ({reason}); is the package index within reach?")


def _write_sentencepiece(folder: Path, model: bytes) -> None:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def _model_of(path: Path) -> bytes:
    """The sentencepiece model whose pieces, scores and types (numbered alike) a GGUF file has."""
    from gguf import GGUFReader
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    fields = GGUFReader(path).fields
    columns = [fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")]
    model = ModelProto()
    for piece, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def _write_byte_level(folder: Path, path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True).save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(lambda: fetch(parse_config(FetchConfig, argv, "Fetch tokenizers of published models")))


if __name__ == "__main__":
    sys.exit(main())
