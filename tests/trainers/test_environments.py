"""Training with an environment: whole tiny runs of GRPO and PPO over several turns."""

import math

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics, read_samples
from coati.trainers.grpo import GRPOConfig, GRPOTrainer
from coati.trainers.ppo import PPOConfig, PPOTrainer
from tests.conftest import ROOT, settings_for
from tests.docs.pages import blocks

# `stop` because this policy has not learned to end its responses
TALK = dict(environment=f"{ROOT / 'tests' / 'talk.py'}:Talk", max_turns=4, max_tokens=120, stop=["e", "o"], rewards=[])


def make(algorithm: str, world, runtime, output, **changes):
    config_class, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "ppo": (PPOConfig, PPOTrainer)}[algorithm]
    settings = settings_for(algorithm, world, output_dir=str(output), temperature=1.0, **TALK | changes)
    return trainer_class(configure(config_class, **settings), runtime)


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("grpo", dict(steps=8, dynamic_sampling=True)),
        ("ppo", dict(steps=8)),
    ],
)
def test_a_policy_learns_from_what_an_environment_gives_it(algorithm, changes, tiny_world, runtime, tmp_path):
    make(algorithm, tiny_world, runtime, tmp_path, **changes).train()
    rows = [row for row in read_metrics(tmp_path) if "reward" in row]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(row["rollout_kl"] < 1e-6 and 0 < row["environment/turns"] <= 3 for row in rows)
    assert sum(row["reward"] for row in rows[-2:]) > sum(row["reward"] for row in rows[:2])
    samples = read_samples(tmp_path)
    assert any("\n\nuser: 2 left\n\nassistant: " in sample["response"] for sample in samples)


def test_the_noted_log_probs_are_those_of_a_forward_pass_over_the_whole_episode(tiny_world, runtime, tmp_path):
    trainer = make("grpo", tiny_world, runtime, tmp_path)
    batch, _ = trainer.rollouts.next(0)
    assert max(len(sample.turns) for sample in batch.samples) == 3
    with torch.no_grad():
        logits = trainer.actor.module.transformer(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    assert (expected - batch.sampling_log_probs[:, 1:])[mask].abs().max() < 1e-5


def test_a_resumed_run_ends_with_the_same_bits(tiny_world, runtime, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    make("grpo", tiny_world, runtime, whole, save_every=2).train()
    make("grpo", tiny_world, runtime, halves, resume=str(whole / "checkpoints" / "step-00000002")).train()
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, halves))
    assert first == second


def test_the_class_of_the_page_trains_a_policy(tiny_world, runtime, tmp_path):
    [block] = blocks(ROOT / "docs" / "environments.md", "python")
    assert len(block.text.splitlines()) <= 25
    (tmp_path / "guess.py").write_text(block.text)
    (tmp_path / "rows.jsonl").write_text('{"secret": 7}\n' * 8)
    changes = dict(environment=f"{tmp_path / 'guess.py'}:GuessTheNumber", train_data=[str(tmp_path / "rows.jsonl")])
    output = tmp_path / "run"
    make("grpo", tiny_world, runtime, output, steps=1, eval_data=[], **changes).train()
    [row] = [row for row in read_metrics(output) if "reward" in row]
    assert row["environment/failed"] == 0 and row["environment/turns"] > 1
    assert (output / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(share_prompts=True), "share_prompts reads one prompt"),
        (dict(advantage="remax"), "remax compares with a greedy response"),
        (dict(overlong_buffer=2), "overlong_buffer is of single responses"),
        (dict(max_new_tokens=120), "has no room for a response of 120"),
    ],
)
def test_what_episodes_do_not_go_with_is_said_at_the_start(changes, message, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=message):
        make("grpo", tiny_world, runtime, tmp_path, **changes)
