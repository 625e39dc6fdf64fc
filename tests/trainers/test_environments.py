"""Training with an environment: whole tiny runs of GRPO and PPO over several turns."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.rollout import describe_tools
from coati.tracking import read_metrics, read_samples
from coati.trainers.grpo import GRPOConfig, GRPOTrainer
from coati.trainers.ppo import PPOConfig, PPOTrainer
from tests.conftest import ROOT, settings_for
from tests.docs.pages import blocks
from tests.trainers.steps import iterate

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
        ("grpo", dict(steps=8, advantage="turns", turn_discount=0.9, turn_rewards=True)),
        ("ppo", dict(steps=8)),
        ("ppo", dict(steps=8, gae_level="turn", turn_rewards=True)),
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


def test_each_turn_has_the_advantage_of_what_it_led_to(tiny_world, runtime, tmp_path):
    changes = dict(advantage="turns", turn_discount=0.0, turn_rewards=True, minibatches=1, batch_size=4)
    found = iterate(make("grpo", tiny_world, runtime, tmp_path, **changes))
    group = found.batch.samples[:4]
    assert len({len(sample.turns) for sample in group}) > 1
    for i, (sample, advantages) in enumerate(zip(group, found.experience.advantages, strict=False)):
        for number, turn in enumerate(sample.turns):
            compared = [other.turns[number].reward for other in group if len(other.turns) > number]
            expected = 0.0
            if len(compared) > 1:
                centered = turn.reward - statistics.mean(compared)
                expected = centered / (statistics.stdev(compared) + 1e-4)
            assert advantages[turn.start : turn.end].tolist() == pytest.approx([expected] * (turn.end - turn.start)), i


def test_the_noted_log_probs_are_those_of_a_forward_pass_over_the_whole_episode(tiny_world, runtime, tmp_path):
    trainer = make("grpo", tiny_world, runtime, tmp_path)
    batch, _ = trainer.rollouts.next(0)
    assert max(len(sample.turns) for sample in batch.samples) == 3
    with torch.no_grad():
        logits = trainer.actor.module.transformer(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    mask = batch.response_mask[:, 1:]
    assert (expected - batch.sampling_log_probs[:, 1:])[mask].abs().max() < 1e-5


def test_a_policy_learns_to_foretell_what_its_environment_says(tiny_world, runtime, tmp_path):
    """ECHO: the loss is each episode's mean over what it read, and falls."""
    changes = dict(observation_coefficient=1.0, learning_rate=1e-2, minibatches=1, ppo_epochs=1)
    trainer = make("grpo", tiny_world, runtime, tmp_path, **changes)
    found = iterate(trainer)
    batch, observed = found.batch, found.experience.observed
    assert not (observed & batch.response_mask).any()
    for sample, row in zip(batch.samples, observed, strict=True):
        read = trainer.tokenizer.decode([token for token, seen in zip(sample.tokens, row, strict=False) if seen])
        assert read.count("User: ") == len(sample.turns) - 1
        assert all(m["content"] in read for m in sample.messages[1:-1] if m["role"] == "user")
    with torch.no_grad():
        log_probs = trainer.actor.module(batch.input_ids, batch.attention_mask)
    means = [-log_probs[i][row].mean() if row.any() else torch.zeros(()) for i, row in enumerate(observed)]
    metrics = [trainer.step(k) for k in range(6)]
    assert metrics[0]["observation_loss"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-4)
    assert metrics[-1]["observation_loss"] < 0.9 * metrics[0]["observation_loss"]


CALLING = """{% for tool in tools or [] %}{{ tool.function.name }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ eos_token if m.role == 'assistant' }}
{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"""


def test_a_policy_uses_tools_as_its_template_writes_them(tiny_world, runtime, tmp_path):
    """A policy that has not learned to call answers at once; one call is put into its mouth."""
    (tmp_path / "template.jinja").write_text(CALLING)
    (tmp_path / "rows.jsonl").write_text('{"question": "What is 2 + 3?", "answer": "5"}\n' * 8)
    changes = dict(
        environment="coati.environments.calculator:Calculator", chat_template=str(tmp_path / "template.jinja")
    )
    rows = [str(tmp_path / "rows.jsonl")]
    changes |= dict(train_data=rows, eval_data=rows, max_tokens=400, max_new_tokens=80, steps=2)
    changes["max_rollout_kl"] = 100.0  # of what it never said
    trainer = make("grpo", tiny_world, runtime, tmp_path / "run", **changes)
    generation = trainer.generation
    assert generation.sampler.call_format == "hermes"
    said = ['<tool_call>{"name": "calculate", "arguments": {"expression": "2 + 3"}}</tool_call>', "5"]
    generate = generation.sampler.generator.generate

    def speak(requests, sampling, on_done, follow_ups):
        requests = [replace(request, keep_states=False) for request in requests]

        def put(i, completion):
            text = said[min(requests[i].seed[-1], 1)]  # by the turn
            ids = [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]
            on_done(i, replace(completion, ids=ids, log_probs=[-1.0] * len(ids), finish_reason="eos"))

        def following(i):
            request = follow_ups.next(i)
            if request is not None:
                requests.append(replace(request, keep_states=False))
                return requests[-1]

        return generate(requests[:], sampling, put, replace(follow_ups, next=following))

    generation.sampler.generator.generate = speak
    trainer.train()
    [row, _] = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    counts = {name: row[f"environment/{name}"] for name in ("tool_calls", "tool_errors", "malformed_calls")}
    assert counts == {"tool_calls": 1, "tool_errors": 0, "malformed_calls": 0}
    [sample, *_] = read_samples(tmp_path / "run")
    assert sample["response"].endswith("\n\ntool: 5\n\nassistant: 5")


def test_a_resumed_run_ends_with_the_same_bits(tiny_world, runtime, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    make("grpo", tiny_world, runtime, whole, save_every=2).train()
    make("grpo", tiny_world, runtime, halves, resume=str(whole / "checkpoints" / "step-00000002")).train()
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, halves))
    assert first == second


SLOW = """
import random, time
from tests.talk import Talk

class Slow(Talk):
    def step(self, message):
        time.sleep(random.uniform(0, 0.01))
        return super().step(message)
"""


def test_how_long_environments_take_changes_no_bit(tiny_world, runtime, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    found = []
    for name, path in (("quick", TALK["environment"]), ("slow", f"{tmp_path / 'slow.py'}:Slow")):
        changes = dict(environment=path, answer_steps=1, generation_batch_size=3)
        found.append(make("grpo", tiny_world, runtime, tmp_path / name, **changes).rollouts.next(0))
    (quick, metrics), (slow, slow_metrics) = found
    assert quick.input_ids.equal(slow.input_ids) and quick.sampling_log_probs.equal(slow.sampling_log_probs)
    for seconds in (metrics, slow_metrics):
        assert 0 <= seconds["seconds/environment"] <= seconds["seconds/generate"]


def test_the_class_of_the_page_trains_a_policy(tiny_world, runtime, tmp_path):
    block, shop, _ = blocks(ROOT / "docs" / "environments.md", "python")
    tools = {}
    exec(shop.text, tools)
    [tool] = describe_tools(tools["Shop"])
    assert tool["function"]["name"] == "price"
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
        (dict(advantage="turns"), "give --environment, and turn_rewards"),
        (dict(advantage="turns", turn_rewards=True, rest_epochs=1), "leave out dynamic_sampling and rest_epochs"),
    ],
)
def test_what_episodes_do_not_go_with_is_said_at_the_start(changes, message, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=message):
        make("grpo", tiny_world, runtime, tmp_path, **changes)
