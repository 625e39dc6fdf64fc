"""The whole command: what it writes, killed and started again, on one rank and on two."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coati.errors import UserError
from colossal_eval import report
from colossal_eval.evaluate import EvaluateConfig, evaluate, main
from colossal_eval.prepare import PrepareConfig, prepare
from colossal_eval.results.published_figures import CARD, compare_published
from colossal_eval.run.response_store import ResponseStore
from tests.applications.colossal_eval.conftest import make_mmlu, write_jsonl
from tests.conftest import ROOT

SCRIPT = ROOT / "applications" / "colossal_eval" / "evaluate.py"


def settings(tiny, prepared, output, **changes) -> EvaluateConfig:
    models = [str(tiny["first"]), str(tiny["second"])]
    given = dict(models=models, tasks=["mmlu"], data=str(prepared), output=str(output), progress="off")
    return EvaluateConfig(**given | changes)


def records_of(output: Path) -> dict[str, str]:
    return {str(path.relative_to(output)): path.read_text() for path in sorted((output / "records").rglob("*.jsonl"))}


def environment() -> dict[str, str]:
    place = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in place}
    return kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'applications'}", "OMP_NUM_THREADS": "1"}


def flags(config: EvaluateConfig) -> list[str]:
    given = ["--models", *config.models, "--tasks", *config.tasks, "--data", config.data, "--output", config.output]
    return [*given, "--progress", "off"]


def test_a_run_writes_records_and_a_report_and_reuses_its_answers(tiny, prepared, runtime, tmp_path, capsys):
    config = settings(tiny, prepared, tmp_path / "out", tasks=["mmlu", "agieval", "gsm8k"], max_new_tokens=6, shots=2)
    found = evaluate(config, runtime)
    said = capsys.readouterr().out
    assert "2 models x mmlu, agieval, gsm8k, float32 on 1 x cpu" in said
    assert "first mmlu: 12 questions, 0 responses reused, 12 new" in said
    assert "tokens through the model" in said
    first = records_of(tmp_path / "out")
    assert set(first) == {f"records/{m}/{b}.jsonl" for m in ("first", "second") for b in ("mmlu", "agieval", "gsm8k")}
    record = json.loads(first["records/first/agieval.jsonl"].splitlines()[0])
    assert {"id", "kind", "scores", "random", "dropped_shots", "fits", "text"} <= set(record)
    assert [(row["benchmark"], row["kind"], row["n"]) for row in found["rows"]] == [
        ("mmlu", "single_choice", 12),
        ("agieval", "single_choice", 2),
        ("agieval", "multi_choice", 1),
        ("agieval", "cloze", 1),
        ("gsm8k", "math", 4),
    ]
    evaluate(config, runtime)
    said = capsys.readouterr().out
    assert "first mmlu: 12 questions, 12 responses reused, 0 new" in said
    assert "first: 0 tokens through the model" in said
    assert records_of(tmp_path / "out") == first


def test_texts_have_a_perplexity_a_byte(tiny, runtime, tmp_path):
    """Beside a plain forward pass of every document."""
    texts = {"news": ["What is 12?", "题目：求值 A. B."], "story": ["Question: What is 3 in anatomy?\nAnswer: A"]}
    for name, documents in texts.items():
        write_jsonl(tmp_path / "texts" / f"{name}.jsonl", [{"text": text} for text in documents])
    data = tmp_path / "data"
    prepare(PrepareConfig(benchmark="texts", data=str(tmp_path / "texts"), output=str(data)))
    found = evaluate(settings(tiny, data, tmp_path / "out", tasks=["texts"], trackers=["tensorboard"]), runtime)
    nats, sizes = nats_of(tiny["first"], texts), {n: sum(len(t.encode()) for t in ts) for n, ts in texts.items()}
    nats["all"], sizes["all"] = sum(nats.values()), sum(sizes.values())
    assert [(row["name"], row["n"], row["bytes"]) for row in found["texts"]] == [
        ("news", 2, sizes["news"]),
        ("story", 1, sizes["story"]),
        ("all", 3, sizes["all"]),
    ]
    for row in found["texts"]:
        rate = nats[row["name"]] / sizes[row["name"]]
        assert row["models"]["first"]["value"] == pytest.approx(math.exp(rate), rel=1e-5)
        [difference] = row["differences"]
        expected = math.log(row["models"]["second"]["value"]) - rate
        assert difference["value"] == pytest.approx(expected, rel=1e-4)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| all | 3 |" in page and "nats per byte, p = " in page
    from coati.tracking import read_metrics

    [row] = read_metrics(tmp_path / "out")
    assert row["first/texts/all"] == found["texts"][-1]["models"]["first"]["value"]


def nats_of(folder: Path, texts: dict[str, list[str]]) -> dict[str, float]:
    """Negative log-likelihood of each file's documents, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = dict.fromkeys(texts, 0.0)
    for name, documents in texts.items():
        for text in documents:
            ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
            log_probs = model(ids).logits.double().log_softmax(-1)[0, :-1]
            found[name] -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
    return found


def test_the_scores_are_tracked_as_a_run(tiny, prepared, runtime, tmp_path):
    from coati.tracking import read_metrics

    config = settings(tiny, prepared, tmp_path / "out", tasks=["mmlu"], shots=1, trackers=["tensorboard"])
    found = evaluate(config, runtime)
    [row] = read_metrics(tmp_path / "out")
    for model, summary in found["rows"][0]["models"].items():
        assert row[f"{model}/mmlu/single_choice"] == summary["mean"]["value"]
        assert row[f"{model}/mmlu/single_choice/stderr"] == summary["mean"]["stderr"]
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_other_settings_do_not_reuse_answers(tiny, prepared, runtime, tmp_path, capsys):
    output = tmp_path / "out"
    one = [str(tiny["first"])]
    evaluate(settings(tiny, prepared, output, models=one), runtime)
    for change in ({"shots": 1}, {"dtype": "bfloat16"}, {"chat_template": True}):
        capsys.readouterr()
        evaluate(settings(tiny, prepared, output, models=one, **change), runtime)
        assert "12 questions, 0 responses reused, 12 new" in capsys.readouterr().out
    evaluate(settings(tiny, prepared, output, models=one, limit=2), runtime)
    assert "4 questions, 4 responses reused, 0 new" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(models=[]), "at least one model"),
        (dict(tasks=["nlu"]), "'nlu' is none of mmlu"),
        (dict(tasks=["cmmlu"]), "holds no prepared benchmark"),
        (dict(limit=0), "limit is 0: it must be at least 1"),
        (dict(shots=-1), "shots is -1: it must be at least 0"),
        (dict(dtype="int8"), "is none of float32"),
        (dict(methods=["guess"]), "'guess' is none of first_token"),
        (dict(models=["/nowhere"]), "is no folder"),
        (dict(max_length=4096), "more than the 1024 tokens"),
    ],
)
def test_mistakes_are_named_before_a_question_is_asked(change, expected, tiny, prepared, runtime, tmp_path):
    with pytest.raises(UserError, match=expected):
        evaluate(settings(tiny, prepared, tmp_path / "out", **change), runtime)
    assert (tmp_path / "out").exists() == ("max_length" in change)


def test_a_folder_of_something_else_is_refused(tiny, prepared, runtime, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="was not written by evaluate"):
        evaluate(settings(tiny, prepared, tmp_path / "out"), runtime)
    assert main(["--models", "/nowhere", "--tasks", "mmlu"]) == 2


def test_help_answers_without_torch():
    code = (
        "import sys; from colossal_eval import evaluate, report, prepare\n"
        "for module in ('torch', 'lm_eval', 'datasets', 'scipy'): assert module not in sys.modules, module"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_a_killed_run_give_the_records_of_one(tiny, prepared, runtime, tmp_path):
    """PITFALL 44: byte for byte. The killed run is started again on another number of ranks."""
    changes = dict(models=[str(tiny["first"])], tasks=["mmlu", "gsm8k"])
    many = prepare_many(tmp_path)
    one = settings(tiny, many, tmp_path / "one", **changes)
    evaluate(one, runtime)
    expected = records_of(tmp_path / "one")
    two = settings(tiny, many, tmp_path / "two", **changes)
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    done = subprocess.run([*torchrun, str(SCRIPT), *flags(two)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert records_of(tmp_path / "two") == expected
    assert all((tmp_path / "two" / "answers" / f"answers-{rank}.jsonl").stat().st_size for rank in (0, 1))

    killed = settings(tiny, many, tmp_path / "killed", **changes)
    code = "import sys; from tests.applications.colossal_eval import test_evaluate as t; t.main_killed(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *flags(killed)], env=environment())
    assert done.returncode == -signal.SIGKILL
    kept = (tmp_path / "killed" / "answers" / "answers-0.jsonl").read_bytes().count(b"\n")
    whole = (tmp_path / "one" / "answers" / "answers-0.jsonl").read_bytes().count(b"\n")
    assert 0 < kept < whole
    assert not (tmp_path / "killed" / "records").exists()
    done = subprocess.run([*torchrun, str(SCRIPT), *flags(killed)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{kept} responses reused" in done.stdout
    assert records_of(tmp_path / "killed") == expected


def main_killed(argv: list[str]):
    """The command in a process that is killed when the first answers are on disk."""
    append = ResponseStore.append

    def append_and_die(store, records):
        append(store, records)
        os.kill(os.getpid(), signal.SIGKILL)

    ResponseStore.append = append_and_die
    main(argv)


def prepare_many(tmp_path) -> Path:
    """Enough subjects that a run can be killed among them."""
    from tests.applications.colossal_eval.conftest import make_gsm8k

    subjects = ("anatomy", "virology", "astronomy", "nutrition", "philosophy", "management")
    make_mmlu(tmp_path / "mmlu", subjects, questions=24)
    make_gsm8k(tmp_path / "gsm8k")
    for name in ("mmlu", "gsm8k"):
        prepare(PrepareConfig(benchmark=name, data=str(tmp_path / name), output=str(tmp_path / "data")))
    return tmp_path / "data"


def record(number: int, score: float, **changes) -> dict:
    labels = list("ABCD")
    return {
        "id": f"anatomy/test/{number}",
        "benchmark": "mmlu",
        "subject": "anatomy" if number % 2 else "virology",
        "category": "other",
        "kind": "single_choice",
        "labels": labels,
        "answers": ["A"],
        "random": 0.25,
        "scores": {"first_token": score},
        "dropped_shots": 0,
        "fits": True,
    } | changes


def keep(output: Path, model: str, records: list[dict], benchmark: str = "mmlu"):
    path = output / "records" / model / f"{benchmark}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in records))


def test_the_report_says_means_errors_chance_and_significance(tmp_path):
    keep(tmp_path, "a", [record(i, float(i < 10)) for i in range(40)])
    keep(tmp_path, "b", [record(i, float(i < 30)) for i in range(40)])
    found = report.write_report(tmp_path, ["a", "b"], ["mmlu"])
    [row] = found["rows"]
    assert (row["n"], row["random"]) == (40, 0.25)
    assert row["models"]["a"]["mean"]["value"] == 0.25
    assert row["models"]["b"]["macro"]["value"] == 0.75
    [difference] = row["differences"]
    assert difference["value"] == 0.5
    assert difference["p_value"] == pytest.approx(2 / 2**20)
    text = (tmp_path / "report.md").read_text()
    assert "| mmlu | first_token | 40 | 25.00 | 25.00 ± 6.93 | 75.00 ± 6.93 |" in text
    assert "| mmlu | b - a | 50.00 ± 8.01 | 1.9e-06 * |" in text
    assert json.loads((tmp_path / "report.json").read_text()) == found
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 2
    assert "<td>25.00 ± 6.93</td>" in html
    assert "mmlu: other" in html
    assert not re.search(r"(src|href)=.http|url\(.?http|@import", html), "something is loaded from elsewhere"
    report.write_report(tmp_path, ["a", "b"], ["mmlu"])
    assert (tmp_path / "report.html").read_text() == html


def test_chinas_subjects_count_in_two_categories(tmp_path):
    about = dict(benchmark="cmmlu", category="Social Science")
    rows = [record(i, float(i < 1), **about, subject=s) for i, s in enumerate(("ethnology", "sociology", "economics"))]
    keep(tmp_path, "a", rows, "cmmlu")
    [row] = report.write_report(tmp_path, ["a"], ["cmmlu"])["rows"]
    found = {name: (score["value"], score["n"]) for name, score in row["models"]["a"]["categories"].items()}
    assert found == {"Social Science": (pytest.approx(1 / 3), 3), "China specific": (1.0, 1)}
    assert row["n"] == 3


def test_models_that_were_asked_different_questions_are_not_compared(tmp_path):
    keep(tmp_path, "a", [record(i, 1.0) for i in range(3)])
    keep(tmp_path, "b", [record(i, 1.0) for i in range(4)])
    with pytest.raises(UserError, match="b was asked other questions of mmlu than a"):
        report.write_report(tmp_path, ["a", "b"], ["mmlu"])
    with pytest.raises(UserError, match="holds no records"):
        report.write_report(tmp_path, ["c"], ["mmlu"])


def test_prompts_that_lost_examples_are_in_the_report(tmp_path):
    keep(tmp_path, "a", [record(0, 1.0, dropped_shots=2), record(1, 0.0, fits=False, dropped_shots=5)])
    report.write_report(tmp_path, ["a"], ["mmlu"])
    text = (tmp_path / "report.md").read_text()
    assert "mmlu, a: 7 few-shot examples did not fit and were left out" in text
    assert "mmlu, a: 1 questions do not fit even alone; not asked, scored 0" in text


def test_the_card_stands_beside_four_choice_questions_only(tmp_path):
    found = {"agieval": {"a": [
        record(0, 1.0, scores={"combined": 1.0, "first_token": 0.0}),
        record(1, 0.0, scores={"combined": 0.0, "first_token": 0.0}, labels=list("ABCDE")),
        record(2, 0.0, scores={"exact_match": 0.0}, kind="cloze"),
    ]}}  # fmt: skip
    rows = compare_published(["a"], found)
    assert rows[-1]["figures"] == {"agieval": "100.00 (ours, n = 1)"}
    assert len(rows) == len(CARD) + 1 == 16
    assert next(row for row in rows if row["name"] == "Colossal-LLaMA-2-7b-base")["figures"]["gaokao_bench"] == "58.82"
    keep(tmp_path, "a", [record(i, 1.0) for i in range(3)])
    report.write_report(tmp_path, ["a"], ["mmlu"], published=True)
    assert "| Llama-2-7B | 44.47 | 32.97 | 32.60 | 25.46 | - |" in (tmp_path / "report.md").read_text()


def test_the_report_can_be_written_again(tmp_path, capsys):
    keep(tmp_path, "a", [record(i, 1.0) for i in range(3)])
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": [str(tmp_path / "a")], "tasks": ["mmlu"]}))
    assert report.main(["--output", str(tmp_path)]) == 0
    assert "report.md" in capsys.readouterr().out
    assert report.main(["--output", str(tmp_path / "nothing")]) == 2
