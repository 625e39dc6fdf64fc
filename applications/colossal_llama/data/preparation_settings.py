"""The settings of `prepare_pretrain`."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

from coati.config import ListOf, Settings, option, settings
from colossal_llama.data.deduplication import Deduplication
from colossal_llama.data.quality_filters import Filters

WITHOUT_EFFECT = ("data", "tokenizer", "output", "processes", "progress")


@settings
class PrepareConfig(Settings):
    """What to read, how to tokenize and pack it, and where to."""

    data: ListOf[str] = option((), ".jsonl files; rows are {source, target, category} or {text, category}", path="file")
    tokenizer: str = option("", "a folder with the tokenizer of the model to be trained", path="model")
    output: str = option(
        "", "the folder to make: bucket_00000, ..., manifest.json; OUTPUT.partial until it is complete", path="output"
    )
    category: str | None = option(None, "the category of rows that name none")
    max_length: int = option(4096, "the longest row, in tokens; longer documents are split, nothing is dropped")
    buckets: int = option(10, "parts of the data, each with its fraction of every category, to train on one by one")
    bos: Literal["auto", "always", "never"] = option("auto", "BOS before a document; auto: if the tokenizer adds it")
    seed: int = option(42, "of the split into buckets and of the order of rows")
    bad_rows: Literal["error", "count"] = option("error", "on malformed rows: stop, or skip and count")
    deduplicate: Literal["none", "exact", "minhash"] = option("none", "drop documents that an earlier one equals")
    minhash_threshold: float = option(0.8, "Jaccard similarity from which on documents are near duplicates, 0 to 1")
    min_characters: int | None = option(None, "drop shorter documents")
    max_symbol_share: float | None = option(None, "drop documents with more punctuation and symbols, 0 to 1")
    max_digit_share: float | None = option(None, "drop documents with more decimal digits, 0 to 1")
    max_repeated_lines: float | None = option(None, "drop documents with more lines that repeat an earlier one, 0 to 1")
    processes: int = option(1, "how many processes work; the result does not depend on it")
    part_megabytes: float = option(4.0, "what a process reads at a time, and what a kill can cost it")
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "bar, plain lines, off, or auto: bar on a terminal"
    )

    def problems(self) -> Iterator[str]:
        for name in ("data", "tokenizer", "output"):
            if not getattr(self, name):
                yield f"--{name} is missing; --help says what it is."
        for name in ("max_length", "buckets", "processes", "part_megabytes"):
            if not getattr(self, name) > 0:
                yield f"--{name} is {getattr(self, name)}; give a number above 0."
        for name in ("minhash_threshold", "max_symbol_share", "max_digit_share", "max_repeated_lines"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                yield f"--{name} is {value}; give a share from 0 to 1."
        if self.seed < 0:
            yield f"--seed is {self.seed}; give 0 or more."
        if len(set(self.data)) < len(self.data):
            yield "--data names a file twice; name each once."
        if self.category is not None and not self.category.strip():
            yield "--category is empty; give a name."

    def result_settings(self) -> dict:
        """The settings on which the result depends, except for the content of the data and of the tokenizer."""
        return {k: v for k, v in asdict(self).items() if k not in WITHOUT_EFFECT}

    @property
    def filters(self) -> Filters:
        """The quality filters."""
        names = ("min_characters", "max_symbol_share", "max_digit_share", "max_repeated_lines")
        return Filters(**{name: getattr(self, name) for name in names})

    @property
    def deduplication(self) -> Deduplication:
        """How duplicates are found."""
        return Deduplication(self.deduplicate, self.minhash_threshold)
