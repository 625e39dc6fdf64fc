"""The example's texts by language, and its English tokenizer."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from coati.files import atomic_write
from examples.tokenizer import byte_level_tokenizer

HELD_BACK = 10  # every tenth document
CURVE = 6  # every sixth of those is evaluated during training
LONGEST = 4000  # characters: longer ones are cut at a line's end, so that what is held back is spread


def write_texts(source: Path, data: Path):
    """en.jsonl, en_eval.jsonl, en_curve.jsonl, the same of zh, and the tokenizer, written atomically."""
    with atomic_write(data) as partial:
        partial.mkdir(parents=True)
        _write_texts(source, partial)


def _write_texts(source: Path, data: Path):
    for language in ("en", "zh"):
        texts = [piece for path in sorted(source.glob(f"{language}_*")) for piece in read_pieces(path)]
        if not texts:
            sys.exit(f"error: {source} has no {language}_*.jsonl or {language}_*.txt")
        for name, kept in (
            (language, [text for i, text in enumerate(texts) if i % HELD_BACK]),
            (f"{language}_eval", texts[::HELD_BACK]),
            (f"{language}_curve", texts[::HELD_BACK][::CURVE]),
        ):
            rows = [json.dumps({"text": text, "category": language}, ensure_ascii=False) + "\n" for text in kept]
            (data / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    train_tokenizer(data / "en.jsonl", data / "english")


def read_pieces(path: Path) -> Iterator[str]:
    """The file's documents, the long ones in pieces."""
    if path.suffix == ".jsonl":
        texts = [json.loads(line)["target"] for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        texts = [path.read_text(encoding="utf-8")]
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > LONGEST:
                yield piece
                piece = ""
            piece += line
        if piece.strip():
            yield piece


def train_tokenizer(text: Path, folder: Path, size: int = 4096):
    """A byte-level BPE tokenizer that has seen English only."""
    from tokenizers import processors

    texts = (json.loads(line)["text"] for line in text.open(encoding="utf-8"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = byte_level_tokenizer(texts, size, special)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.save_pretrained(folder)
