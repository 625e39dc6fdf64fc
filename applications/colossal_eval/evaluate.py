"""Evaluate models on prepared benchmarks: `evaluate.py --models A B --tasks mmlu cmmlu --data DATA --output OUT`.

Under `colossalai run` or torchrun the ranks share the questions. Started again after it was killed, a run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from coati.config import option, parse_config
from coati.errors import UserError
from coati.tracking.config import TrackingConfig
from coati.tracking.files import replace_file
from colossal_eval.report import slug, write_report
from colossal_eval.run.model_loading import column_names, model_folder
from colossal_eval.run.task_yaml import SETTINGS, TaskOptions, load_tasks, subjects_of, write_tasks
from colossal_eval.scores.metrics import choice_log_probs, random_guess, size

MARK = "evaluation.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class EvaluateConfig(TrackingConfig):
    """Settings of evaluate.py."""

    models: list[str] = option(
        (), "model folders, LoRA adapters, coati runs or checkpoints; one column each", path="model"
    )
    tasks: list[str] = option((), f"prepared benchmarks: {', '.join(SETTINGS)}")
    data: str = option("runs/eval/data", "what prepare.py wrote", path="output")
    output: str = option(
        "runs/eval/out", "folder of answers, records and report; gone on with if it is there", path="output"
    )
    shots: int | None = option(None, "few-shot examples; default: 5, gaokao_bench 0")
    methods: list[str] = option((), "of single-answer questions: first_token, generate, choice_perplexity")
    max_new_tokens: int | None = option(None, "longest generated answer; default: 32, gsm8k 256")
    limit: int | None = option(None, "only the first questions of each subject")
    chat_template: bool = option(False, "ask in the tokenizer's chat template, an example a turn")
    max_length: int | None = option(None, "longest prompt and answer in tokens; default: what the model can read")
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
    for name, value in (("limit", config.limit), ("max_new_tokens", config.max_new_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if config.shots is not None and config.shots < 0:
        raise UserError(f"--shots {config.shots} must not be negative")
    if config.dtype not in DTYPES:
        raise UserError(f"--dtype {config.dtype!r} is none of {', '.join(DTYPES)}")
    options(config).check()
    for benchmark in config.tasks:
        subjects_of(benchmark, Path(config.data).expanduser())
    return dict(zip(column_names(config.models), map(model_folder, config.models), strict=True))


def options(config: EvaluateConfig) -> TaskOptions:
    """What the run changes of the benchmarks' settings."""
    return TaskOptions(config.shots, config.methods, config.max_new_tokens)


def open_output(config: EvaluateConfig) -> Path:
    """The output folder: a new one, or one of an earlier evaluation.

    Raises:
        UserError: it holds something else.
    """
    output = Path(config.output).expanduser()
    if output.exists() and not (output / MARK).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there and was not written by evaluate.py: give another --output")
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / MARK, json.dumps(asdict(config), indent=1) + "\n")
    # from scratch, since options may have changed; what depends on them is in the answers' keys
    shutil.rmtree(output / "tasks", ignore_errors=True)
    for benchmark in config.tasks:
        write_tasks(benchmark, Path(config.data).expanduser(), output / "tasks", options(config))
    return output


def evaluate(config: EvaluateConfig, runtime) -> dict:
    """Run every model on every benchmark and write the report, which is returned (on rank 0; elsewhere empty).

    Args:
        runtime: of `coati.parallel.runtime`.
    """
    folders = check(config)
    output = Path(config.output).expanduser()
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
    if runtime.is_main and (config.wandb != "disabled" or config.tensorboard):
        track(report, config, output)
    runtime.say(f"report: {output / 'report.md'}")
    return report


def track(report: dict, config: EvaluateConfig, output: Path) -> None:
    """The report's means and standard errors as a run in W&B and TensorBoard: `MODEL/BENCHMARK/KIND`."""
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
    from colossal_eval.run.model_loading import load_model
    from colossal_eval.run.response_store import AnswerStore

    output = Path(config.output).expanduser()
    loaded = load_model(name, folder, config.dtype, runtime.device, config.max_length)
    store = AnswerStore(output / "answers", runtime.rank)
    runtime.communicator.barrier()  # nobody writes before all have read
    settings = {"dtype": config.dtype, "device": runtime.device.type}
    lm = CoatiLM(loaded, store, runtime.communicator, config, config.batch_tokens, settings)
    runtime.say(f"{name}: {folder}, up to {loaded.max_length} tokens, batches of {lm.batch_tokens} tokens")
    for benchmark in config.tasks:
        reused, added = store.reused, store.added
        records, results = run_benchmark(lm, output / "tasks", benchmark, config)
        new = int(runtime.communicator.sum(store.added - added))
        runtime.say(f"{name} {benchmark}: {len(records)} questions, {store.reused - reused} answers reused, {new} new")
        for line in notes(records):
            runtime.say(f"{name} {benchmark}: {line}")
        if runtime.is_main:
            _write_records(output / "records" / slug(name), benchmark, records, results)
    usage = lm.scorer.usage
    read, padding = (int(runtime.communicator.sum(n)) for n in (usage.read, usage.padding))
    runtime.say(f"{name}: {read:,} tokens through the model, {padding:,} of padding beside them")


def run_benchmark(lm, tasks: Path, benchmark: str, config: EvaluateConfig) -> tuple[list[dict], dict]:
    """One record a question, and lm-eval's own results."""
    from lm_eval.evaluator import evaluate as run

    loaded = load_tasks(tasks, benchmark)
    for task in loaded["tasks"].values():
        task.model = lm
    try:
        results = run(lm, loaded, limit=config.limit, apply_chat_template=config.chat_template, bootstrap_iters=1)
    finally:
        lm.text.forget()
    samples = results.pop("samples")
    records = [
        record_of(benchmark, loaded["tasks"][name], sample) for name, found in samples.items() for sample in found
    ]
    return records, results


def record_of(benchmark: str, task, sample: dict) -> dict:
    """What is kept of a question: its scores, what the model gave, and what a blind guess earns."""
    doc, context = sample["doc"], task.contexts[sample["doc"]["id"]]
    record = {
        "id": doc["id"],
        "benchmark": benchmark,
        "subject": doc["subject"],
        "category": doc["category"],
        "kind": doc["kind"],
        "labels": doc["labels"],
        "answers": doc["answers"],
        "random": random_guess(doc["kind"], doc["labels"], doc["answers"]),
        "scores": {name: sample[name] for name in sample["metrics"]},
        "dropped_shots": context.dropped,
        "fits": context.fits,
    }
    given = sample["filtered_resps"]
    if not context.fits:
        return record
    if doc["kind"] == "text":
        record |= {"log_prob": given[0], "bytes": size(doc["question"])}
    if "first_token" in task.methods:
        width = len(context.styles)
        count = len(doc["labels"]) * width
        found = [log_prob for log_prob, _ in given[:count]]
        record["log_probs"] = choice_log_probs([found[i : i + width] for i in range(0, count, width)])
        given = given[count:]
    if "generate" in task.methods:
        record["text"] = given[0]
    return record


def notes(records: list[dict]) -> list[str]:
    """What a reader must know of the prompts: examples left out, questions not asked."""
    dropped = [record["dropped_shots"] for record in records if record["dropped_shots"] and record["fits"]]
    unasked = sum(not record["fits"] for record in records)
    lines = [f"{sum(dropped)} examples of {len(dropped)} prompts left out, which did not fit"] if dropped else []
    return lines + ([f"{unasked} questions do not fit even without examples: not asked, scored 0"] if unasked else [])


def _write_records(folder: Path, benchmark: str, records: list[dict], results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(folder / f"{benchmark}.jsonl", lines)
    kept = {name: results[name] for name in ("results", "groups", "n-samples", "n-shot", "versions") if name in results}
    replace_file(folder / f"{benchmark}.lm_eval.json", json.dumps(kept, indent=1, default=str) + "\n")


def _quiet() -> None:
    """lm-eval's own bars and notices: a bar a subject is too many, and it has no option against them."""
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
        for number in (signal.SIGINT, signal.SIGTERM):  # answers are on disk: nothing is lost by ending at once
            signal.signal(number, signal.SIG_DFL)
        evaluate(config, runtime)
        shutdown()
        return 0
    except UserError as error:
        if runtime.first_to_fail() if runtime else os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except Exception:
        if runtime is None or runtime.first_to_fail():
            traceback.print_exc()
        status = 1
    if runtime is not None and runtime.world_size > 1:
        os._exit(status)  # the others may wait for this rank in a collective call
    return status


if __name__ == "__main__":
    sys.exit(main())
