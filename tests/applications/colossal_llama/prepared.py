"""What the tests of `prepare_pretrain` share: two tiny tokenizers, a run in this process, and reading what it wrote."""

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from colossal_llama.prepare_pretrain import main

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = "hello world (  red red green blue lamp clock"
FOLDERS = tempfile.TemporaryDirectory()


@cache
def byte_level() -> str:
    """The folder of a byte-level BPE tokenizer that puts BOS in front and trims white space off its offsets.

    An opening bracket takes the white space behind it along, so that a token may end in spaces.
    """
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\(\s*| ?[^\s(]+|\s+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trimming = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder = _train(backend, trainers.BpeTrainer, "byte_level", vocab_size=320, initial_alphabet=alphabet)
    backend.post_processor = processors.Sequence([trimming, bos])
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL).save_pretrained(folder)
    return folder


@cache
def metaspace() -> str:
    """The folder of a tokenizer in the manner of SentencePiece, with byte fall-back and no BOS of its own."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    folder = _train(backend, trainers.BpeTrainer, "metaspace", vocab_size=320, more=pieces)
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL).save_pretrained(folder)
    return folder


def _train(backend: Tokenizer, trainer, name: str, more: tuple = (), **options) -> str:
    special = [*SPECIAL.values(), *more]
    backend.train_from_iterator([WORDS] * 20, trainer(special_tokens=special, show_progress=False, **options))
    return str(Path(FOLDERS.name) / name)


def write_jsonl(path: Path, rows: list) -> str:
    """Rows, or ready lines as bytes, a line each; returns the path."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def corpus(count: int = 60) -> list[dict]:
    """Documents of 1 to about 90 tokens in three categories, a third of them with a source."""
    words = WORDS.split()
    return [
        {
            "source": f"{words[i % 7]} {i}" if i % 3 == 0 else "",
            "target": " ".join(words[(i * i + j) % len(words)] for j in range(1 + i * 7 % 40)),
            "category": ("en", "zh", "code")[i * i % 7 % 3],
        }
        for i in range(count)
    ]


def flags(data: str, output: Path, *more: str, tokenizer: str | None = None) -> list[str]:
    """A command line for `main`; later flags win."""
    common = [f"--tokenizer={tokenizer or byte_level()}", f"--output={output}", "--buckets=1", "--progress=off"]
    return ["--data", *data.split(","), *common, *more]


def run(data: str, output: Path, *more: str, tokenizer: str | None = None) -> dict:
    """Prepare `data` (paths with commas between) in this process; returns the manifest."""
    assert main(flags(data, output, *more, tokenizer=tokenizer)) == 0
    return json.loads((output / "manifest.json").read_text(encoding="utf-8"))


def read_rows(output: Path) -> Iterator[dict]:
    """All rows of all buckets."""
    for folder in sorted(output.glob("bucket_*")):
        yield from datasets.load_from_disk(str(folder))


def content(output: Path) -> dict[str, bytes]:
    """Every file of an output, byte by byte."""
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}
