"""Benchmarks at a trainer's evaluations."""

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from colossal_eval.callback import Benchmarks
from colossal_eval.evaluate import EvaluateConfig, evaluate
from colossal_eval.prepare import PrepareConfig, prepare
from tests.applications.colossal_eval.conftest import write_jsonl
from tests.conftest import settings_for, trainer_classes

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


def train(algorithm, world, runtime, output, model, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), steps=2, eval_every=1, learning_rate=1e-3)
    output.parent.joinpath("plain.jinja").write_text(TEMPLATE)
    settings |= dict(model=str(model), model_config=None, tokenizer=str(model), **changes)
    settings |= dict(chat_template=str(output.parent / "plain.jinja"), max_length=512)
    trainer_class(configure(config_class, **settings), runtime).train()


def test_every_evaluation_has_what_evaluate_finds(prepared, tiny, tiny_world, runtime, tmp_path):
    model = tiny["first"]
    (tmp_path / "mine.py").write_text(
        "from colossal_eval.callback import Benchmarks\n"
        f"quick = Benchmarks(tasks=['mmlu', 'gsm8k'], data={str(prepared)!r}, limit=3, shots=1, max_new_tokens=4)\n"
    )
    train("sft", tiny_world, runtime, tmp_path / "run", model, evaluators=[f"{tmp_path}/mine.py:quick"])
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/mmlu" in row]
    assert [row["step"] for row in rows] == [0, 1, 2] and all("eval/gsm8k" in row for row in rows)
    final = str(tmp_path / "run" / "model")
    common = dict(tasks=["mmlu"], data=str(prepared), limit=3, shots=1, max_new_tokens=4, progress="off")
    for path, row in ((str(model), rows[0]), (final, rows[2])):
        config = EvaluateConfig(models=[path], output=str(tmp_path / f"out-{row['step']}"), **common)
        [found] = [r for r in evaluate(config, runtime)["rows"] if r["benchmark"] == "mmlu"]
        [summary] = found["models"].values()
        assert row["eval/mmlu"] == pytest.approx(summary["mean"]["value"])


def test_texts_are_read_too(tiny, tiny_world, runtime, tmp_path):
    write_jsonl(tmp_path / "texts" / "news.jsonl", [{"text": "What is 12?"}, {"text": "Answer: A"}])
    prepare(PrepareConfig(benchmark="texts", data=str(tmp_path / "texts"), output=str(tmp_path / "data")))
    (tmp_path / "mine.py").write_text(
        "from colossal_eval.callback import Benchmarks\n"
        f"reads = Benchmarks(tasks=['texts'], data={str(tmp_path / 'data')!r})\n"
    )
    train("sft", tiny_world, runtime, tmp_path / "run", tiny["first"], evaluators=[f"{tmp_path}/mine.py:reads"])
    first, *_ = [row["eval/texts"] for row in read_metrics(tmp_path / "run") if "eval/texts" in row]
    config = EvaluateConfig(models=[str(tiny["first"])], tasks=["texts"], data=str(tmp_path / "data"), progress="off")
    config.output = str(tmp_path / "out")
    assert first == pytest.approx(evaluate(config, runtime)["texts"][0]["models"]["first"]["value"])


def test_a_reward_model_answers_no_questions(prepared, tiny, tiny_world, runtime, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"from colossal_eval.callback import Benchmarks\nquick = Benchmarks(tasks=['mmlu'], data={str(prepared)!r})\n"
    )
    with pytest.raises(UserError, match="RewardModel is no language model"):
        train("reward", tiny_world, runtime, tmp_path / "run", tiny["first"], evaluators=[f"{tmp_path}/mine.py:quick"])


def test_a_benchmark_that_is_not_prepared_is_said_when_the_file_is_read(tmp_path):
    with pytest.raises(UserError, match="holds no prepared benchmark"):
        Benchmarks(tasks=["mmlu"], data=str(tmp_path))
