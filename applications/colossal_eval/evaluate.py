"""Evaluate models on prepared benchmarks: `evaluate.py --models A B --tasks mmlu cmmlu --data DATA --output OUT`.

Under `colossalai run` or torchrun the questions are split over the ranks. A run that was killed continues when started
again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path

from coati.config import ListOf, option, parse_config, settings
from coati.errors import UserError
from coati.files import replace_file
from coati.tracking import check_installed
from coati.tracking.config import TrackingConfig
from coati.trainers.main import end_process
from colossal_eval.benchmarks.benchmark_settings import SETTINGS, TaskOptions
from colossal_eval.report import EVALUATION, write_report
from colossal_eval.run.model_loading import column_names, load_model, model_folder
from colossal_eval.run.question_records import notes, records_folder, run_benchmark, write_records
from colossal_eval.run.response_store import ResponseStore
from colossal_eval.run.task_yaml import subjects_of, write_tasks

DTYPES = ("float32", "bfloat16", "float16", "float64")


@settings
class EvaluateConfig(TrackingConfig):
    """Settings of evaluate.py."""

    models: ListOf[str] = option(
        (), "model folders, LoRA adapters, coati runs or checkpoints; one column each", path="model"
    )
    tasks: ListOf[str] = option((), f"prepared benchmarks: {', '.join(SETTINGS)}")
    data: str = option("runs/eval/data", "what prepare.py wrote", path="output")
    output: str = option(
        "runs/eval/out", "folder of responses, records and report; continued if it is there", path="output"
    )
    shots: int | None = option(None, "few-shot examples; default: 5, gaokao_bench 0", ge=0)
    methods: ListOf[str] = option((), "of single-answer questions: first_token, generate, choice_perplexity")
    max_new_tokens: int | None = option(None, "longest generated response; default: 32, gsm8k 256", ge=1)
    limit: int | None = option(None, "only the first questions of each subject", ge=1)
    chat_template: bool = option(False, "ask in the tokenizer's chat template, one example per turn")
    max_length: int | None = option(None, "longest prompt and response in tokens; default: what the model can read")
    dtype: str = option("float32", f"of the weights: {', '.join(DTYPES)} (for checks)")
    batch_tokens: int | None = option(None, "tokens of a batch; default: from the memory of the GPU, 8192 on a CPU")
    published: bool = option(False, "compare with the figures of the Colossal-LLaMA-2 card")


def check(config: EvaluateConfig) -> dict[str, Path]:
    """Column names and folders of the models.

    Raises:
        UserError: whatever can be known to fail before a model is loaded.
    """
    if not config.models or not config.tasks:
        raise UserError("name at least one model with --models and one benchmark with --tasks")
    if config.dtype not in DTYPES:
        raise UserError(f"--dtype {config.dtype!r} is none of {', '.join(DTYPES)}")
    options(config).check()
    check_installed(config.trackers)
    for benchmark in config.tasks:
        subjects_of(benchmark, Path(config.data))
    return dict(zip(column_names(config.models), map(model_folder, config.models), strict=True))


def options(config: EvaluateConfig) -> TaskOptions:
    """What the run changes of the benchmarks' settings."""
    return TaskOptions(config.shots, config.methods, config.max_new_tokens)


def open_output(config: EvaluateConfig) -> None:
    """Makes the output folder, or takes the one of an earlier evaluation, and writes the tasks into it.

    Raises:
        UserError: it holds something else.
    """
    output = Path(config.output)
    if output.exists() and not (output / EVALUATION).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there and was not written by evaluate.py: give another --output")
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / EVALUATION, json.dumps(asdict(config), indent=1) + "\n")
    # from scratch, since options may have changed; what depends on them is in the responses' keys
    shutil.rmtree(output / "tasks", ignore_errors=True)
    for benchmark in config.tasks:
        write_tasks(benchmark, Path(config.data), output / "tasks", options(config))


def evaluate(config: EvaluateConfig, runtime) -> dict:
    """Run every model on every benchmark and write the report, which is returned (on rank 0; elsewhere empty).

    Args:
        runtime: of `coati.parallel.runtime`.
    """
    folders = check(config)
    output = Path(config.output)
    with runtime.main_first():
        if runtime.is_main:
            open_output(config)
    _quiet()
    runtime.say(
        f"{len(folders)} models x {', '.join(config.tasks)}, {config.dtype} on {runtime.world_size} x "
        f"{runtime.device.type}, into {output}" + (f"; the first {config.limit} of a subject" if config.limit else "")
    )
    for name, folder in folders.items():
        _evaluate_model(config, runtime, name, folder)
    report = write_report(output, list(folders), config.tasks, config.published) if runtime.is_main else {}
    if runtime.is_main and config.trackers:
        track(report, config, output)
    runtime.say(f"report: {output / 'report.md'}")
    return report


def track(report: dict, config: EvaluateConfig, output: Path) -> None:
    """The report's means and standard errors as a run in the trackers: `MODEL/BENCHMARK/KIND`."""
    from coati.tracking import make_tracker

    metrics = {}
    for row in report["rows"]:
        for model, found in row["models"].items():
            name = f"{model}/{row['benchmark']}/{row['kind']}"
            metrics[name] = found["mean"]["value"]
            if found["mean"]["stderr"] is not None:
                metrics[f"{name}/stderr"] = found["mean"]["stderr"]
    for row in report["texts"]:
        for model, found in row["models"].items():
            metrics[f"{model}/texts/{row['name']}"] = found["value"]
    tracker = make_tracker(output, config, algorithm="evaluate", settings=asdict(config))
    tracker.log(metrics, 0)
    tracker.finish("finished")


def _evaluate_model(config: EvaluateConfig, runtime, name: str, folder: Path) -> None:
    from colossal_eval.run.harness_model import CoatiLM

    output = Path(config.output)
    loaded = load_model(name, folder, config.dtype, runtime.device, config.max_length)
    store = ResponseStore(output / "answers", runtime.rank)
    runtime.communicator.barrier()  # no rank writes before all have read
    settings = {"dtype": config.dtype, "device": runtime.device.type}
    lm = CoatiLM(loaded, store, runtime.communicator, config, config.batch_tokens, settings)
    runtime.say(f"{name}: {folder}, up to {loaded.max_length} tokens, batches of {lm.batch_tokens} tokens")
    for benchmark in config.tasks:
        reused, added = store.reused, store.added
        records, results = run_benchmark(lm, output / "tasks", benchmark, config.limit, config.chat_template)
        new = int(runtime.communicator.sum(store.added - added))
        runtime.say(
            f"{name} {benchmark}: {len(records)} questions, {store.reused - reused} responses reused, {new} new"
        )
        for line in notes(records):
            runtime.say(f"{name} {benchmark}: {line}")
        if runtime.is_main:
            write_records(records_folder(output, name), benchmark, records, results)
    usage = lm.scorer.usage
    read = int(runtime.communicator.sum(usage.read))
    padding = int(runtime.communicator.sum(usage.padding))
    runtime.say(f"{name}: {read:,} tokens through the model, and {padding:,} padding tokens")


def _quiet() -> None:
    """lm-eval's own bars and notices: a bar per subject is too many, and it has no option against them."""
    import lm_eval.api.task
    from tqdm import tqdm

    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """The command: 2 for a mistake of the user's, 1 for another error."""
    runtime = None
    try:
        config = parse_config(EvaluateConfig, argv, description=__doc__)
        check(config)
        from coati.parallel import launch
        from coati.parallel.runtime import shutdown

        runtime = launch(0)
        for number in (signal.SIGINT, signal.SIGTERM):  # responses are on disk: nothing is lost by ending at once
            signal.signal(number, signal.SIG_DFL)
        evaluate(config, runtime)
        shutdown()
        status = 0
    except UserError as error:
        if runtime.first_to_fail() if runtime else os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except Exception:
        if runtime is None or runtime.first_to_fail():
            traceback.print_exc()
        status = 1
    if runtime is not None:
        end_process(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
