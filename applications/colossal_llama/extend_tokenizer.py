"""Adds the pieces of a language or domain to a BPE tokenizer, so that they are produced and old texts stay as they are.

`python applications/colossal_llama/extend_tokenizer.py --tokenizer FOLDER --corpus zh.jsonl --output FOLDER`
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from colossal_llama.output_folder import new_folder
from colossal_llama.tokenizer.raw_texts import read_texts, sample_texts

REPORT = "extension.json"


@settings
class ExtendConfig(Settings):
    """Settings of `extend_tokenizer`."""

    tokenizer: str = option("", "folder of the tokenizer to extend (a model's folder will do)", path="model")
    output: str = option("", "folder of the extended tokenizer; must not exist", path="output")
    corpus: ListOf[str] = option((), ".jsonl and .txt files to learn from, and to measure on", path="file")
    field: str = option("text", "the field of .jsonl rows; without it, source and target")
    pieces: str | None = option(None, '.jsonl file of {"piece": "..."}: add these instead of learning any', path="file")
    size: int = option(10000, "tokens to add at most, when they are learned")
    min_frequency: int = option(10, "how often a learned piece must occur")
    characters: ListOf[str] = option(
        ("non-ascii",), "a learned piece has one of these: non-ascii, any, scripts such as han, classes such as [à-ÿ]"
    )
    coverage: float = option(0.9995, "share of the corpus's such characters that become tokens themselves")
    dead: Literal["reach", "drop", "keep"] = option(
        "reach", "pieces that would never be produced: add what leads to them, leave them out, or only report them"
    )
    old_text: ListOf[str] = option((), "files in the old language, to see that their tokens stay", path="file")
    sample_size: int = option(1000, "documents, drawn from corpus and old text, to check on")
    seed: int = option(0, "of the sample", ge=0)
    progress: Literal["auto", "bar", "plain", "off"] = option("auto", "what the terminal shows meanwhile")

    def check(self) -> None:
        """Raises UserError for settings that cannot be."""
        if not self.corpus and not self.pieces:
            raise UserError("Nothing to add: give texts with --corpus or a list with --pieces.")
        for name, least in (("size", 1), ("min_frequency", 1), ("sample_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; give {least} or more.")
        if not 0 < self.coverage <= 1:
            raise UserError(f"--coverage is {self.coverage}; give a share above 0, at most 1.")


def extend(config: ExtendConfig) -> dict:
    """Write the extended tokenizer and return its report, which `extension.json` in the folder holds too.

    Raises:
        UserError: see `open_tokenizer`, `read_texts`, `CharacterFilter` and `new_folder`; a setting is wrong.
    """
    config.check()
    from colossal_llama.tokenizer.character_filter import CharacterFilter
    from colossal_llama.tokenizer.extension_checks import as_json
    from colossal_llama.tokenizer.new_pieces import settle_dead
    from colossal_llama.tokenizer.tokenizer_folder import open_tokenizer, write_tokenizer

    allowed = CharacterFilter(config.characters)
    with new_folder(config.output) as folder:
        source = open_tokenizer(config.tokenizer)
        old = source.vocabulary.tokenizer()
        print(f"extending {config.tokenizer} ({len(source.vocabulary)} ids) into {config.output}", flush=True)
        sample = _add(source.vocabulary, config, allowed)
        vocabulary, dead, dropped = settle_dead(source.vocabulary, config.dead)
        if not vocabulary.new:
            raise UserError("No piece was added: all are old, too rare (--min_frequency) or out of reach (--dead).")
        report = {
            "settings": asdict(config),
            "old_size": vocabulary.first_new,
            "new_size": len(vocabulary),
            "dead": dead,
            "dropped": dropped,
            "files_left_out": write_tokenizer(source, vocabulary, folder),
            **_measure(source, old, folder, sample, config),
        }
        text = json.dumps(as_json(report), ensure_ascii=False, indent=1)
        (folder / REPORT).write_text(text, encoding="utf-8")
    return report


def _add(vocabulary, config: ExtendConfig, allowed) -> list[str]:
    """Add the pieces; returns a sample of the corpus, or of the pieces without one."""
    from colossal_llama.tokenizer.new_pieces import add_characters, add_given, frequent_characters, learn_pieces

    listed_pieces = _read_pieces(config.pieces) if config.pieces else []
    counts: Counter[str] = Counter()
    sample = sample_texts(_counted(config, counts), config.sample_size, config.seed) if config.corpus else listed_pieces
    if config.pieces:
        add_given(vocabulary, [vocabulary.symbols(piece) for piece in listed_pieces], config.dead == "reach")
        return sample
    letters = frequent_characters(counts, allowed, config.coverage, config.min_frequency)
    add_characters(vocabulary, letters, allowed, config.size)
    texts = _with_progress(read_texts(config.corpus, config.field), counts.total(), config)
    learn_pieces(vocabulary, texts, allowed, config.size, config.min_frequency)
    return sample


def _counted(config: ExtendConfig, counts: Counter[str]) -> Iterator[str]:
    for text in read_texts(config.corpus, config.field):
        counts.update(text)
        yield text


def _with_progress(texts: Iterable[str], characters: int, config: ExtendConfig) -> Iterator[str]:
    from coati.tracking.config import TrackingConfig
    from coati.tracking.progress import progress_bar

    million = 1_000_000
    with progress_bar(characters // million + 1, "million characters", TrackingConfig(progress=config.progress)) as bar:
        seen = 0
        for text in texts:
            yield text
            seen += len(text)
            while bar.step < seen // million:
                bar.advance()
        bar.advance()


def _read_pieces(path: str) -> list[str]:
    if not path.endswith(".jsonl"):
        raise UserError(f'--pieces {path}: give a .jsonl file with rows such as {{"piece": "你好"}}.')
    return list(read_texts([path], "piece"))


def _measure(source, old, folder: Path, sample: list[str], config: ExtendConfig) -> dict:
    from tokenizers import Tokenizer

    from colossal_llama.tokenizer.character_filter import CharacterFilter
    from colossal_llama.tokenizer.extension_checks import check_ids, compare, encoder, lines_without, variants

    check_ids(source, folder)
    new = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before, after = encoder(old), encoder(new)
    lines = lines_without(sample, CharacterFilter(config.characters))
    report = {"unchanged_lines_without_new_characters": compare(lines, before, after)}
    if config.old_text:
        texts = sample_texts(read_texts(config.old_text, config.field), config.sample_size, config.seed)
        report["unchanged_old_text"] = compare(texts, before, after)
    characters = sum(map(len, sample))
    return {
        **report,
        "agrees_before": variants(source.path, old, sample),
        "agrees_after": variants(folder, new, sample),
        "tokens_per_character_before": sum(map(len, before(sample))) / characters,
        "tokens_per_character_after": sum(map(len, after(sample))) / characters,
    }


def show(report: dict) -> None:
    """Print what was done."""
    print(f"{report['new_size'] - report['old_size']} tokens added: {report['old_size']} -> {report['new_size']}")
    print(f"dead pieces found: {len(report['dead'])}, dropped: {len(report['dropped'])}")
    kept = len(report["dead"]) if report["settings"]["dead"] == "keep" else 0
    if kept:
        print(f"WARNING: {kept} dead pieces kept, such as {report['dead'][:5]}")
    for name in ("unchanged_lines_without_new_characters", "unchanged_old_text"):
        if name in report:
            print(f"{name.replace('_', ' ')}: {report[name]}")
    for name, comparison in report["agrees_after"].items():
        earlier = report["agrees_before"].get(name)
        warning = "WARNING: " if comparison.different else ""
        print(f"{warning}tokenizer.json and {name}: {comparison} (before: {earlier or 'not available'})")
    print(
        "tokens per character: {tokens_per_character_before:.3f} -> {tokens_per_character_after:.3f}".format(**report)
    )
    if report["files_left_out"]:
        print(f"left out, as they describe the old tokenizer: {', '.join(report['files_left_out'])}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_command(lambda: show(extend(parse_config(ExtendConfig, argv, "Extend a tokenizer's vocabulary"))))


if __name__ == "__main__":
    sys.exit(main())
