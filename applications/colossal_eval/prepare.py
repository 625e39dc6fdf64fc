"""From published benchmark files to task files: `prepare.py --benchmark mmlu --data FOLDER --output runs/eval/data`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from coati.files import atomic_write
from colossal_eval.benchmarks.converters import CONVERTERS
from colossal_eval.benchmarks.prepared_folder import describe, write_questions, write_summary
from colossal_eval.benchmarks.published_rows import Row

SHOWN = 20  # malformed rows that are named


@settings
class PrepareConfig(Settings):
    """Settings of prepare.py."""

    benchmark: str = option("", f"one of {', '.join(CONVERTERS)}")
    data: str = option("", "folder with the published files, or datasets:NAME, such as datasets:cais/mmlu", path="file")
    output: str = option(
        "runs/eval/data", "folder for the task files; the benchmark gets a folder in it", path="output"
    )
    subjects: ListOf[str] = option((), "only these subjects; each must be there")
    bad_rows: Literal["error", "drop"] = option(
        "error", "error: malformed rows end the conversion; drop: they are named and skipped"
    )


def published_rows(config: PrepareConfig) -> Iterator[Row]:
    """The rows of a folder in its published layout, or else of a `datasets` name."""
    if config.benchmark not in CONVERTERS:
        raise UserError(f"--benchmark {config.benchmark!r} is none of {', '.join(CONVERTERS)}")
    if not config.data:
        raise UserError("--data is missing: name the folder with the benchmark's published files")
    if config.data.startswith("datasets:"):
        from colossal_eval.benchmarks.datasets_hub import hub_rows

        return hub_rows(config.benchmark, config.data.removeprefix("datasets:"))
    return CONVERTERS[config.benchmark](Path(config.data))


def prepare(config: PrepareConfig) -> Path:
    """Convert one benchmark; returns its folder.

    Raises:
        UserError: another layout, malformed rows, an output that is there.
    """
    rows = published_rows(config)
    folder = Path(config.output) / config.benchmark
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or give another --output")
    with atomic_write(folder) as partial:
        partial.mkdir(parents=True)
        conversion = write_questions(rows, partial, config.subjects)
        check_problems(conversion.problems, config.bad_rows)
        write_summary(partial, config.benchmark, config.data, conversion)
    print("\n".join([*describe(config.benchmark, conversion), f"written to {folder}"]))
    return folder


def check_problems(problems: list[str], bad_rows: str) -> None:
    """Names malformed rows: on stderr if they may be dropped, else in a UserError."""
    if not problems:
        return
    shown = problems[:SHOWN]
    if len(problems) > SHOWN:
        shown.append(f"and {len(problems) - SHOWN} more")
    text = "\n  ".join([f"{len(problems)} malformed rows:", *shown])
    if bad_rows == "error":
        raise UserError(f"{text}\ncorrect them, or leave them out with --bad_rows drop")
    print(text, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: prepare(parse_config(PrepareConfig, argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
