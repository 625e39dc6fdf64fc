"""Rounds of rejection sampling and of online DPO: what they train on, and that each starts from the one before."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import examples.rounds
from tests.conftest import ROOT


@pytest.fixture
def rounds(tiny_world, tmp_path, monkeypatch):
    """Runs an example of two rounds with stages that train nothing; the stages' arguments."""

    def run(script: str) -> list[tuple]:
        stages = []

        def train(algorithm: str, config: Path, output: Path, flags: dict, processes: int):
            stages.append((algorithm, flags))
            shutil.copytree(tiny_world["policy"], output / "model")

        monkeypatch.setattr(examples.rounds, "train", train)
        words = ["--model", tiny_world["policy"], "--prompts", tiny_world["prompts"], "--output", str(tmp_path)]
        words += ["--reward", f"{tiny_world['rewards']}:odd", "--config", "c.yaml"]
        words += ["--rounds", "2", "--n", "4", "--most", "10", "--max_new_tokens", "5"]
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return stages

    return run


def rows(flags: dict) -> list[dict]:
    return [json.loads(line) for line in flags["train_data"].read_text().splitlines()]


def test_rejection_sampling_trains_on_the_best_responses(rounds, tmp_path, capsys):
    (first, flags), (_, later) = rounds("rejection_sampling.py")
    assert first == "sft" and later["model"] == tmp_path / "round0" / "run" / "model"
    assert rows(flags) and all(len(row["completion"]) % 2 == 1 for row in rows(flags))
    assert rows(flags) != rows(later)
    said = capsys.readouterr().out
    assert f"{len(rows(flags))} of 10 prompts are informative" in said and "the policy is in" in said


def test_online_dpo_trains_on_best_against_worst(rounds):
    (algorithm, flags), _ = rounds("online_dpo.py")
    assert algorithm == "preference" and rows(flags)
    for row in rows(flags):
        assert (len(row["chosen"]) % 2, len(row["rejected"]) % 2) == (1, 0) and row["prompt"]


def test_responses_that_all_earn_the_same_train_nothing(rounds, tmp_path, monkeypatch, capsys):
    (tmp_path / "flat.py").write_text("def flat(prompts, responses, **columns):\n    return [1.0] * len(responses)\n")
    load = examples.rounds.load_function
    monkeypatch.setattr(examples.rounds, "load_function", lambda place: load(f"{tmp_path}/flat.py:flat"))
    assert rounds("rejection_sampling.py") == []
    assert "mean reward 1.000, 0 of 10 prompts are informative" in capsys.readouterr().out
