"""GRPO on GSM8K's questions on two processes: a model that was shown some solutions answers, and its answers are scored
by their last line. At this size next to none is right: what is shown is that all of it works together."""

import json
import re

import pytest

from coati.tracking import read_metrics, read_samples
from tests.conftest import ROOT, write_new_model, write_rows
from tests.distributed.forks import run_jobs

DATA = ROOT.parent / "shared" / "data" / "gsm8k"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}"),
]
COMMON = dict(max_length=256, too_long="drop", batch_size=32, progress="off")


def rows(name: str, count: int) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()[:count]]


def right(response: str, solution: str) -> float:
    """Whether the number after `####` is the solution's."""
    found = re.search(r"####\s*(-?[\d,]+)", response)
    return float(found is not None and found[1].replace(",", "") == solution.rpartition("#### ")[2].replace(",", ""))


@pytest.mark.timeout(1800)
def test_grpo_runs_on_real_questions_with_the_reward_really_evaluated(tmp_path):
    texts = [text for row in rows("train.jsonl", 4000) for text in row.values()]
    common = COMMON | dict(model=write_new_model(tmp_path / "start", texts), cache_dir=str(tmp_path / "cache"))
    taught = [{"prompt": row["question"], "completion": row["answer"]} for row in rows("train.jsonl", 4000)]
    asked = [{"prompt": row["question"], "answer": row["answer"]} for row in rows("train.jsonl", 400)]
    held_out = [{"prompt": row["question"], "answer": row["answer"]} for row in rows("test.jsonl", 100)]
    files = {"taught": taught, "asked": asked, "held_out": held_out}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", some) for name, some in files.items()}
    sft = common | dict(train_data=[paths["taught"]], output_dir=str(tmp_path / "sft"), steps=200, learning_rate=2e-3)
    run_jobs([{"name": "sft", "algorithm": "sft", "settings": sft | dict(micro_batch_size=8)}], tmp_path / "one", 2)
    grpo = common | dict(model=str(tmp_path / "sft" / "model"), output_dir=str(tmp_path / "grpo"), plugin="zero2")
    grpo |= dict(train_data=[paths["asked"]], eval_data=[paths["held_out"]], rewards=["gsm8k"], reward_workers=1)
    grpo |= dict(steps=4, batch_size=16, group_size=4, micro_batch_size=16, learning_rate=1e-4, samples=100)
    grpo |= dict(
        max_prompt_length=192, max_new_tokens=96, missing_eos_penalty=None, dynamic_sampling=True, max_refills=1
    )
    run_jobs([{"name": "grpo", "algorithm": "grpo", "settings": grpo}], tmp_path / "two", 2)

    trained = [row for row in read_metrics(tmp_path / "grpo") if "policy_loss" in row]
    assert len(trained) == 4 and all(0 <= row["reward/gsm8k"] <= 1 for row in trained)
    assert all(row["reward/gsm8k/failed"] == 0 for row in trained)
    samples = read_samples(tmp_path / "grpo")
    ended = [row["response"] for row in samples if "####" in row["response"]]
    print(f"{len(ended)} of {len(samples)} responses have a last line, reward {[row['reward'] for row in trained]}")
    assert len(ended) > len(samples) / 4  # the solutions' form was learned
    solutions = {row["prompt"]: row["answer"] for row in held_out}
    for row in samples:
        [solution] = [answer for question, answer in solutions.items() if question in row["prompt"]]
        assert row["reward"] == right(row["response"], solution), row
