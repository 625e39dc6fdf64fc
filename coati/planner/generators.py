"""`coati plan generators`: how many of some devices should train and how many sample, from what a run has measured."""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coati.config.plugin import PluginConfig
from coati.errors import UserError
from coati.run_layout import JOURNAL
from coati.tracking.files import read_metrics, read_run
from coati.tracking.timeline import IDLE, generator_bars, trainer_bars

WARM_UP = 2  # iterations that are not counted


@dataclass(frozen=True)
class Rates:
    """What an iteration of a run took.

    Attributes:
        trainers, generators: processes of the run; ahead: its `max_staleness`.
        trainer_seconds, generator_seconds: of all trainers, and of all generators, without waiting.
        seconds: by the clock.
        copies: processes that hold one copy of the model, of which trainers are a multiple.
        rows: what the copies must divide.
    """

    trainers: int
    generators: int
    ahead: int
    trainer_seconds: float
    generator_seconds: float
    seconds: float
    copies: int
    rows: int


@dataclass(frozen=True)
class Split:
    """Seconds of an iteration with so many processes, and the shares of them that each side has nothing to do."""

    trainers: int
    generators: int
    seconds: float
    trainers_idle: float
    generators_idle: float


def main(argv: list[str]) -> int:
    """Prints the splits, the best one marked; returns 0.

    Raises:
        UserError: a folder without a run with generators, or devices that don't suffice for one.
    """
    parser = argparse.ArgumentParser(
        prog="coati plan generators",
        description="How devices are best split between training and sampling, from the rates of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run with --generators, of a few iterations")
    parser.add_argument("--gpus", type=int, required=True, help="devices to split, one for each process")
    options = parser.parse_args(argv)
    rates = read_rates(options.run)
    splits = list(possible_splits(rates, options.gpus))
    if not splits:
        raise UserError(
            f"--gpus {options.gpus}: no number of trainers leaves one for a generator, is a multiple of {rates.copies} "
            f"and divides {rates.rows} rows: give more"
        )
    print(table(rates, splits))
    return 0


def read_rates(folder: Path) -> Rates:
    """The rates of a run, its first iterations left out.

    Raises:
        UserError: see `main`.
    """
    run, bars = read_run(folder), generator_bars(folder / JOURNAL)
    rows = [row for row in read_metrics(folder) if f"seconds/{IDLE}" in row][WARM_UP:]
    if not rows or not bars:
        raise UserError(
            f"{folder} has no more than {WARM_UP} iterations with generators, or no journal of them: run some with "
            "coati run --generators 1 (and --keep_journal true)"
        )
    worked = [sum(bar.end - bar.start for bar in trainer_bars([row]) if bar.kind != IDLE) for row in rows]
    jobs = [bar for of_one in bars.values() for bar in of_one]
    load, generate = ([bar.end - bar.start for bar in jobs if bar.kind == kind] for kind in ("load", "generate"))
    a_job = statistics.median(load) + statistics.median(generate)
    settings = run["settings"]
    parallel = PluginConfig(**settings["parallel"])
    return Rates(
        trainers=run["world_size"],
        generators=len(bars),
        ahead=settings["generators"]["max_staleness"],
        trainer_seconds=run["world_size"] * statistics.median(worked),
        generator_seconds=run["world_size"] * a_job,  # each trainer's samples are one job
        seconds=statistics.median(spent + row[f"seconds/{IDLE}"] for spent, row in zip(worked, rows, strict=True)),
        copies=parallel.model_parallel_size,
        rows=settings["batch_size"] // settings["algorithm"]["minibatches"],
    )


def possible_splits(rates: Rates, devices: int) -> Iterator[Split]:
    """Every split that the batch allows, as if work divided evenly among processes.

    Samples of several iterations are drawn at a time at most, one job for each trainer: more generators than that have
    nothing to do. With `ahead` 0 the two sides take turns.
    """
    for trainers in range(rates.copies, devices, rates.copies):
        if rates.rows % (trainers // rates.copies):
            continue
        generators = devices - trainers
        training = rates.trainer_seconds / trainers
        sampling = rates.generator_seconds / min(generators, trainers * max(rates.ahead, 1))
        seconds = max(training, sampling) if rates.ahead else training + sampling
        busy = rates.generator_seconds / generators
        yield Split(trainers, generators, seconds, 1 - training / seconds, 1 - busy / seconds)


def table(rates: Rates, splits: list[Split]) -> str:
    """A line for each split, the best one marked, what was measured, and what to start."""
    best = min(splits, key=lambda split: split.seconds)
    lines = [
        f"measured with {rates.trainers} trainers and {rates.generators} generators, max_staleness {rates.ahead}: "
        f"{rates.seconds:.3g} s per iteration",
        f"of all trainers {rates.trainer_seconds:.3g} s of work, of all generators {rates.generator_seconds:.3g} s",
        "trainers  generators  s per iteration  trainers idle  generators idle",
    ]
    for split in splits:
        lines.append(
            f"{split.trainers:8}  {split.generators:10}  {split.seconds:15.3g}  {split.trainers_idle:13.0%}  "
            f"{split.generators_idle:15.0%}" + ("  *" if split is best else "")
        )
    lines.append(
        f"* coati run --nproc_per_node {best.trainers} --generators {best.generators}, if work divides evenly among "
        "processes; measure again there"
    )
    return "\n".join(lines)
