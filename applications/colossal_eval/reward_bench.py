"""Reward models on pairs in RewardBench's layout: `reward_bench.py --models A B --data filtered.parquet --output OUT`.

Every pair's rewards are kept as they come; a run that was killed continues.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.data import load_rows, parse_record
from coati.data.messages import Messages
from coati.errors import UserError, run_command
from coati.files import replace_file
from coati.tracking.config import TrackingConfig
from coati.tracking.progress import progress_bar
from colossal_eval.results.reward_pairs import report_of, report_text
from colossal_eval.run.model_loading import column_names, hash_files, model_folder
from colossal_eval.run.response_store import ResponseStore, digest


@settings
class RewardBenchConfig(Settings):
    """Settings of reward_bench.py."""

    models: ListOf[str] = option(
        (), "reward models' folders or coati runs, or classifiers with one output; one column each", path="model"
    )
    data: str = option("", "rows of prompt, chosen, rejected and subset, as .parquet or .jsonl", path="file")
    output: str = option(
        "runs/eval/reward_bench", "folder of rewards and report; continued if it is there", path="output"
    )
    limit: int | None = option(None, "only the first pairs of each subset", ge=1)
    progress: str = option("auto", "auto, bar, plain or off")


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse response.

    Attributes:
        id: the row's own, or its number.
    """

    id: str
    subset: str
    prompt: Messages
    chosen: str
    rejected: str


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """The pairs of a file, or the first `limit` of each subset.

    Raises:
        UserError: a row is wrong (with its line), or there is none.
    """
    if not path.is_file():
        raise UserError(f"--data {str(path)!r} is no file; name one in RewardBench's layout, .parquet or .jsonl")
    pairs: list[Pair] = []
    counts: dict[str, int] = {}
    for number, row in load_rows(str(path)):
        try:
            pair = make_pair(number, row)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        counts[pair.subset] = counts.get(pair.subset, 0) + 1
        if limit is None or counts[pair.subset] <= limit:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} has no rows")
    return pairs


def make_pair(number: int, row: dict | ValueError) -> Pair:
    """A row as a pair.

    Raises:
        ValueError: it is none.
    """
    if isinstance(row, ValueError):
        raise row
    [record] = parse_record(row, "preference")
    subset = row.get("subset")
    if not isinstance(subset, str) or not subset:
        raise ValueError("`subset` must be a text; write the same one, such as all, in every row if there are none")
    responses = (record.chosen, record.rejected)
    if any(len(messages) != 1 for messages in responses):
        raise ValueError("chosen and rejected must be one message each")
    chosen, rejected = (messages[0]["content"] for messages in responses)
    return Pair(str(row.get("id", number)), subset, record.prompt, chosen, rejected)


def rewards_of(name: str, folder: Path, pairs: list[Pair], output: Path, tracking: TrackingConfig) -> list[dict]:
    """A record per pair with the rewards of both responses; those that are in `output` are not computed again.

    Raises:
        UserError: the model can't be loaded, or can't read a pair.
    """
    from coati.responses import open_scorer

    fingerprint = hash_files(folder)
    store = ResponseStore(output)
    keys = [digest(fingerprint, pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    waiting = [(key, pair) for key, pair in zip(keys, pairs, strict=True) if key not in store]
    print(f"{name}: {len(pairs)} pairs, {len(pairs) - len(waiting)} reused")
    if waiting:
        score = open_scorer(str(folder), "--models")
        with progress_bar(len(waiting), name, tracking) as bar:
            for key, pair in waiting:
                chosen, rejected = score(pair.prompt, [pair.chosen, pair.rejected])
                store.append([{"key": key, "answer": {"chosen": chosen, "rejected": rejected}}])
                bar.advance()
    return [{"id": pair.id, "subset": pair.subset} | store[key] for key, pair in zip(keys, pairs, strict=True)]


def evaluate(config: RewardBenchConfig) -> dict:
    """Scores all pairs with all models, writes rewards-MODEL.jsonl, report.json and report.md, and returns the report.

    Raises:
        UserError: a wrong setting or file, or a model that can't be used.
    """
    if not config.models:
        raise UserError("name at least one reward model with --models")
    folders = dict(zip(column_names(config.models), map(model_folder, config.models), strict=True))
    pairs = read_pairs(Path(config.data), config.limit)
    output, tracking = Path(config.output), TrackingConfig(progress=config.progress)
    records = {name: rewards_of(name, folder, pairs, output, tracking) for name, folder in folders.items()}
    for name, rows in records.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_file(output / f"rewards-{name.replace('/', '_')}.jsonl", lines)
    report = report_of(records)
    replace_file(output / "report.json", json.dumps(report, indent=1) + "\n")
    replace_file(output / "report.md", report_text(report))
    print(report_text(report))
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""

    def run() -> int:
        evaluate(parse_config(RewardBenchConfig, argv, description=__doc__))
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
