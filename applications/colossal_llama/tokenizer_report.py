"""Compares tokenizers on texts: vocabulary, compression rate, tokens per sample, bytes per token, use of new tokens.

`python applications/colossal_llama/tokenizer_report.py --tokenizers A B --corpus zh.jsonl en.jsonl --output FOLDER`

The compression rate is Colossal-LLaMA-2's: tokens per character. (In its table the average length of a sample divided
by the rate is 111.8 for every model: the characters of a sample.) Tokens are counted without BOS and EOS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from colossal_llama.output_folder import new_folder
from colossal_llama.tokenizer.raw_texts import read_texts, sample_texts

BATCH = 64


@settings
class ReportConfig(Settings):
    """Settings of `tokenizer_report`."""

    tokenizers: ListOf[str] = option((), "tokenizer folders; a row each", path="model")
    corpus: ListOf[str] = option((), ".jsonl and .txt files; a table each", path="file")
    output: str = option("", "folder for report.md, report.json and report.svg; must not exist", path="output")
    base: str | None = option(
        None, "tokenizer folder that others extend: how many of their further tokens are used?", path="model"
    )
    field: str = option("text", "the field of .jsonl rows; without it, source and target")
    samples: int = option(0, "documents to draw from each file; 0: all", ge=0)
    seed: int = option(0, "of the drawing", ge=0)
    progress: Literal["auto", "bar", "plain", "off"] = option("auto", "what the terminal shows meanwhile")


@dataclass
class Row:
    """What one tokenizer makes of one corpus; `new_tokens_used` is a share, None without new tokens."""

    tokenizer: str
    vocabulary_size: int
    samples: int
    characters: int
    bytes: int
    tokens: int
    tokens_per_character: float
    tokens_per_sample: float
    bytes_per_token: float
    new_tokens: int
    new_tokens_used: float | None


def measure(name: str, tokenizer, texts: Iterable[str], old: set[str] | None = None) -> Row:
    """Count over the texts, a batch of which is in memory at a time.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        old: the base tokenizer's pieces; if all are there, the others count as new.
    """
    samples = characters = size = tokens = 0
    used: set[int] = set()
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            samples += 1
            characters += len(text)
            size += len(text.encode())
            tokens += len(encoding.ids)
            used.update(encoding.ids)
    vocabulary = tokenizer.get_vocab()
    extends = old is not None and old <= vocabulary.keys()
    new = {token for piece, token in vocabulary.items() if piece not in old} if extends else set()
    return Row(
        tokenizer=name,
        vocabulary_size=len(vocabulary),
        samples=samples,
        characters=characters,
        bytes=size,
        tokens=tokens,
        tokens_per_character=tokens / characters,
        tokens_per_sample=tokens / samples,
        bytes_per_token=size / tokens,
        new_tokens=len(new),
        new_tokens_used=len(new & used) / len(new) if new else None,
    )


def report(config: ReportConfig) -> dict[str, list[Row]]:
    """Write the report; returns the rows of each corpus file.

    Raises:
        UserError: nothing to compare, two tokenizers of one name, or see `load_backend` and `read_texts`.
    """
    from coati.tracking.config import TrackingConfig
    from coati.tracking.progress import progress_bar
    from colossal_llama.tokenizer.tokenizer_folder import load_backend

    if not config.tokenizers or not config.corpus:
        raise UserError("Nothing to compare: give folders with --tokenizers and texts with --corpus.")
    names, titles = [_unique(paths) for paths in (config.tokenizers, config.corpus)]
    with new_folder(config.output) as folder:
        old = set(load_backend(config.base).get_vocab()) if config.base else None
        print(f"comparing {len(names)} tokenizers on {len(titles)} files, report in {config.output}", flush=True)
        tables: dict[str, list[Row]] = {title: [] for title in titles}
        with progress_bar(len(names) * len(titles), "tables", TrackingConfig(progress=config.progress)) as bar:
            for name, path in zip(names, config.tokenizers, strict=True):
                tokenizer = load_backend(path)
                for title, file in zip(titles, config.corpus, strict=True):
                    texts: Iterable[str] = read_texts([file], config.field)
                    if config.samples:
                        texts = sample_texts(texts, config.samples, config.seed)
                    tables[title].append(measure(name, tokenizer, texts, old))
                    bar.advance()
        (folder / "report.md").write_text(markdown(tables, old is not None), encoding="utf-8")
        rows = {title: [asdict(row) for row in table] for title, table in tables.items()}
        (folder / "report.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        draw(tables, folder / "report.svg")
    return tables


def _unique(paths: list[str]) -> list[str]:
    names = [Path(path).name for path in paths]
    for name in names:
        if not name or names.count(name) > 1:
            raise UserError(f"{name!r} names no folder or file, or two; rename one, as the tables go by names.")
    return names


def markdown(tables: dict[str, list[Row]], with_new: bool) -> str:
    """The tables in the form of Colossal-LLaMA-2's."""
    parts = []
    heads = [
        "Model",
        "Vocabulary Size",
        "Compression Rate",
        "Average Length of Samples (token-level)",
        "Bytes per Token",
    ]
    heads += ["New Tokens Used"] * with_new
    for title, rows in tables.items():
        lines = [f"## {title}", "", f"{rows[0].samples} samples, {rows[0].characters} characters.", ""]
        lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        for row in rows:
            cells = [row.tokenizer, str(row.vocabulary_size), f"{row.tokens_per_character:.3f}"]
            cells += [f"{row.tokens_per_sample:.3f}", f"{row.bytes_per_token:.2f}"]
            if with_new:
                share = row.new_tokens_used
                cells.append("-" if share is None else f"{share:.1%} of {row.new_tokens}")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Bars of tokens per character, a group per tokenizer, a color per corpus."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib, which draws the report, is missing; pip install matplotlib.") from None
    names = [row.tokenizer for row in next(iter(tables.values()))]
    figure = Figure(figsize=(8, 1 + 0.22 * len(names) * (len(tables) + 1)), layout="constrained")
    axes = figure.subplots()
    for number, (title, rows) in enumerate(tables.items()):
        row_positions = [place * (len(tables) + 1) + number for place in range(len(rows))]
        bars = axes.barh(row_positions, [row.tokens_per_character for row in rows], height=0.9, label=title)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks([place * (len(tables) + 1) + (len(tables) - 1) / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per character (less is better)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        config = parse_config(ReportConfig, argv, "Compare tokenizers")
        tables = report(config)
        print(markdown(tables, config.base is not None))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
