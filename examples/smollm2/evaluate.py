"""SmolLM2 on benchmarks by colossal_eval, beside lm-evaluation-harness by itself.

    python examples/smollm2/evaluate.py --data ../shared/data --write_docs

Four evaluations of the same questions: with colossal_eval's prompts and with those of lm-eval's own tasks, each by
colossal_eval's model and by lm-eval's `hf` model. With the same prompts the two must agree on every question. What is
finished isn't done again.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "applications")]

from coati.errors import UserError  # noqa: E402
from coati.files import write_json  # noqa: E402
from colossal_eval.benchmarks.prepared_folder import read_questions, read_summary  # noqa: E402
from colossal_eval.benchmarks.question import Question  # noqa: E402
from colossal_eval.prepare import PrepareConfig, prepare  # noqa: E402
from colossal_eval.scores.metrics import mean  # noqa: E402
from examples.smollm2.model import make_model  # noqa: E402
from examples.stages import fill_figures  # noqa: E402


@dataclass(frozen=True)
class Subset:
    """Which questions are asked, and how.

    Attributes:
        stock: lm-eval's own task of a subject, in its folder of tasks.
        metric, stock_metric: colossal_eval's and that task's.
        limit: the first questions of each subject.
        subjects: all that are there if empty.
        max_new_tokens: of generated responses.
    """

    stock: str
    metric: str
    stock_metric: str
    limit: int
    subjects: tuple[str, ...] = ()
    shots: int = 0
    max_new_tokens: int = 32


SUBSETS = {
    "mmlu": Subset("mmlu/default/mmlu_{}.yaml", "first_token", "acc", limit=2),
    "cmmlu": Subset("cmmlu/cmmlu_{}.yaml", "first_token", "acc", limit=2),
    "agieval": Subset("agieval/{}.yaml", "combined", "acc", limit=8, subjects=("aqua-rat", "sat-math")),
    "gsm8k": Subset("gsm8k/gsm8k.yaml", "exact_match", "exact_match", limit=20, shots=2, max_new_tokens=96),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder per benchmark")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", help="where everything goes")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/results.md too")
    arguments = parser.parse_args()
    output, data = arguments.output.resolve(), arguments.data.resolve()
    if missing := [name for name in SUBSETS if not (data / name).is_dir()]:
        sys.exit(f"error: {data} has no folder {missing[0]}: name the folder that has it with --data")
    from datasets import disable_progress_bars

    from coati.parallel import launch

    disable_progress_bars()  # one per subject
    try:
        model, runtime = make_model(output / "model"), launch(0)
        for name in SUBSETS:
            evaluate_benchmark(name, model, data, output / "evaluation", runtime)
    except UserError as error:
        sys.exit(f"error: {error}")
    table = figures(output / "evaluation")
    (output / "evaluation" / "figures.md").write_text(table + "\n")
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "results.md", table, "evaluation")


def evaluate_benchmark(name: str, model: Path, data: Path, folder: Path, runtime):
    """All four evaluations of one benchmark, each to a JSON file in `folder`/outcomes."""
    subset, prepared = SUBSETS[name], folder / "data"
    if not (prepared / name).exists():
        options = {"data": str(data / name), "output": str(prepared), "subjects": list(subset.subjects)}
        prepare(PrepareConfig(benchmark=name, **options))
    tasks = folder / "tasks" / name
    stock_names = write_stock_tasks(name, prepared, data, tasks)
    evaluations = {
        "ours, ours": lambda: by_colossal_eval(name, model, folder, runtime),
        "ours, hf": lambda: our_tasks_by_lm_eval(name, hugging_face(model), folder),
        "stock, ours": lambda: stock_tasks(name, colossal_eval_model(model, tasks, runtime), tasks, stock_names),
        "stock, hf": lambda: stock_tasks(name, hugging_face(model), tasks, stock_names),
    }
    for which, run in evaluations.items():
        path = folder / "outcomes" / name / f"{which}.json"
        if not path.exists():
            print(f"{name}: {which}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, run())


# --- the evaluations


def by_colossal_eval(name: str, model: Path, folder: Path, runtime) -> list[dict]:
    """As its command does it; the report is in `folder`/NAME."""
    from colossal_eval.evaluate import EvaluateConfig, evaluate
    from colossal_eval.run.question_records import read_records

    subset, output = SUBSETS[name], folder / name
    options = dict(limit=subset.limit, shots=subset.shots, max_new_tokens=subset.max_new_tokens)
    paths = dict(models=[str(model)], data=str(folder / "data"), output=str(output))
    evaluate(EvaluateConfig(tasks=[name], progress="off", **paths, **options), runtime)
    return [of_record(record, subset.metric) for record in read_records(output, model.name, name).values()]


def our_tasks_by_lm_eval(name: str, lm, folder: Path) -> list[dict]:
    """The task files that colossal_eval has written, by another model of lm-eval."""
    from lm_eval.evaluator import evaluate

    from colossal_eval.run.question_records import record_of
    from colossal_eval.run.task_yaml import load_tasks

    loaded = load_tasks(folder / name / "tasks", name)
    results = evaluate(lm, loaded, limit=SUBSETS[name].limit, bootstrap_iters=0)
    return [
        of_record(record_of(name, loaded["tasks"][task], sample), SUBSETS[name].metric)
        for task, samples in results["samples"].items()
        for sample in samples
    ]


def stock_tasks(name: str, lm, tasks: Path, names: list[str]) -> list[dict]:
    """lm-eval's own tasks, by its `hf` model or by colossal_eval's."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    subset = SUBSETS[name]
    generated = {"gen_kwargs": {"max_gen_toks": subset.max_new_tokens}} if name == "gsm8k" else {}
    results = simple_evaluate(
        lm,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=subset.shots,
        limit=subset.limit,
        bootstrap_iters=0,
        **generated,
    )
    return of_samples((s for samples in results["samples"].values() for s in samples), subset.stock_metric)


def hugging_face(model: Path):
    """lm-eval's `hf` model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8)


def colossal_eval_model(model: Path, tasks: Path, runtime):
    """colossal_eval's model, for any task of lm-eval."""
    from coati.tracking.config import TrackingConfig
    from colossal_eval.run.harness_model import CoatiLM
    from colossal_eval.run.model_loading import load_model
    from colossal_eval.run.response_store import ResponseStore

    loaded = load_model(model.name, model, "float32", runtime.device)
    store = ResponseStore(tasks / "responses", runtime.rank)
    return CoatiLM(loaded, store, runtime.communicator, TrackingConfig(progress="off"))


# --- lm-eval's own tasks over local rows


def write_stock_tasks(name: str, prepared: Path, data: Path, folder: Path) -> list[str]:
    """A YAML file per subject that includes lm-eval's own task and changes where its rows are; the tasks' names.

    The rows have the columns of the data set that the task reads from the hub. AGIEval's `query`, which only that has,
    is made in the words of its zero-shot prompts (Zhong et al. 2023, 2304.06364).
    """
    import lm_eval
    import yaml

    names = []
    for subject in read_summary(prepared / name)["subjects"]:
        if name == "gsm8k":
            files = {split: str(data / name / f"{split}.jsonl") for split in ("train", "test")}
        else:
            files = {split: str(folder / f"{subject}-{split}.jsonl") for split in ("dev", "test")}
            for split, path in files.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                rows = [stock_row(name, q) for q in read_questions(prepared / name / split / f"{subject}.jsonl")]
                Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        names.append(f"stock_{name}_{subject}")
        included = Path(lm_eval.__file__).parent / "tasks" / SUBSETS[name].stock.format(subject)
        task = {"include": str(included), "task": names[-1], "dataset_path": "json", "dataset_name": None}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{subject}.yaml").write_text(yaml.safe_dump(task | {"dataset_kwargs": {"data_files": files}}))
    return names


def stock_row(name: str, question: Question) -> dict:
    """A question in the columns of cais/mmlu, haonan-li/cmmlu or hails/agieval-*."""
    right = question.labels.index(question.answers[0])
    if name == "mmlu":
        return {"question": question.question, "choices": question.choices, "answer": right}
    if name == "cmmlu":
        choices = dict(zip(question.labels, question.choices, strict=True))
        return {"Question": question.question, **choices, "Answer": question.answers[0]}
    options = [f"({label}){text}" for label, text in zip(question.labels, question.choices, strict=True)]
    listed = f"{question.passage}Q: {question.question} Answer Choices: {' '.join(options)}"
    query = f"{listed}\nA: Among A through {question.labels[-1]}, the answer is"
    return {"query": query, "choices": options, "gold": [right]}


# --- outcomes


def of_record(record: dict, metric: str) -> dict:
    """The outcome of a question: its score, the log-probs of its choices in nats, and the generated text."""
    texts = [record["text"]] if "text" in record else []
    return {"score": record["scores"][metric], "log_probs": record.get("log_probs", []), "texts": texts}


def of_samples(samples: Iterable[dict], metric: str) -> list[dict]:
    """The outcomes of lm-eval's samples, of GSM8K's two readings of a text the strict one."""
    found = []
    for sample in samples:
        if sample["filter"] in ("none", "strict-match"):
            responses = [response for [response] in sample["resps"]]
            texts = [response for response in responses if isinstance(response, str)]
            log_probs = [response[0] for response in responses if not isinstance(response, str)]
            found.append({"score": sample[metric], "log_probs": log_probs, "texts": texts})
    return found


def figures(folder: Path) -> str:
    """The table of docs/results.md."""
    titles = ["benchmark", "questions", "prompts, metric", "colossal_eval", "lm-eval's `hf`"]
    titles += ["same score", "log-probs apart", "same text"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, subset in SUBSETS.items():
        for kind, title in (("ours", "colossal_eval's"), ("stock", "lm-eval's")):
            mine, other = (
                json.loads((folder / "outcomes" / name / f"{kind}, {model}.json").read_text())
                for model in ("ours", "hf")
            )
            metric = subset.metric if kind == "ours" else subset.stock_metric
            cells = [told(mine), told(other), *agreement(mine, other)]
            lines.append(f"| {name} | {len(mine)} | {title}, {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(outcomes: list[dict]) -> str:
    """The mean score in percent and its standard error."""
    score = mean([outcome["score"] for outcome in outcomes])
    return f"{100 * score.value:.1f} ± {100 * score.stderr:.1f}"


def agreement(mine: list[dict], other: list[dict]) -> tuple[str, str, str]:
    """On how many questions the scores agree; the largest difference of two log-probs; how many texts are the same."""
    pairs = list(zip(mine, other, strict=True))
    scores = sum(a["score"] == b["score"] for a, b in pairs)
    gaps = [abs(p - q) for a, b in pairs for p, q in zip(a["log_probs"], b["log_probs"], strict=True)]
    texts = [text == same for a, b in pairs for text, same in zip(a["texts"], b["texts"], strict=True)]
    gap = f"{max(gaps):.0e}" if gaps else ""
    return f"{scores} of {len(pairs)}", gap, f"{sum(texts)} of {len(texts)}" if texts else ""


if __name__ == "__main__":
    main()
