"""What value methods of PPO do with the critic: targets of its own, a lambda by length, bounds, several steps."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from coati.config import configure
from coati.data import collate_sft
from coati.errors import UserError
from coati.losses import gae, length_adaptive_lambda, returns_to_go
from coati.models import Actor
from coati.trainers import actor_critic
from coati.trainers.ppo import PPOConfig, PPOTrainer
from tests.conftest import functions, reward_model, sentence, settings_for, write_rows
from tests.trainers.steps import end_some_answers, iterate


def make(world, runtime, output, **changes) -> PPOTrainer:
    settings = settings_for("ppo", world, output_dir=str(output), whiten_advantages=False, kl_coefficient=0.0)
    return PPOTrainer(configure(PPOConfig, **settings | changes), runtime)


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_the_critic_learns_what_was_earned_and_the_policy_from_a_lambda_by_length(
    shared_trunk, tiny_world, runtime, tmp_path
):
    options = dict(length_adaptive_alpha=0.4, critic_lambda=1.0, shared_trunk=shared_trunk)
    trainer = make(tiny_world, runtime, tmp_path, **options)
    end_some_answers(trainer)
    found = iterate(trainer)
    batch, experience = found.batch, found.experience
    mask, values = batch.response_mask, experience.values
    scores = torch.zeros_like(values)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    scores[torch.arange(len(last)), last] = batch.scores
    torch.testing.assert_close(experience.returns[mask], returns_to_go(scores, mask, 1.0)[mask], rtol=1e-4, atol=1e-5)
    lam = length_adaptive_lambda(mask, 0.4)
    assert len(lam.unique()) > 1
    advantages, _ = gae(values, scores, mask, 1.0, lam)
    torch.testing.assert_close(experience.advantages[mask], advantages[mask], rtol=1e-4, atol=1e-5)


def test_a_policy_may_sample_ids_that_reward_model_and_critic_have_not(tiny_world, runtime, tmp_path):
    """Of an output layer that is padded to more rows than the tokenizer has tokens."""
    actor = Actor(config=LlamaConfig.from_pretrained(tiny_world["policy"], vocab_size=400))
    actor.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(tmp_path / "policy")
    changes = dict(model=str(tmp_path / "policy"), critic_model=tiny_world["reward"])
    changes |= dict(rewards=[reward_model(tiny_world["reward"])], temperature=3.0, whiten_advantages=True)
    trainer = make(tiny_world, runtime, tmp_path / "run", **changes)
    found = iterate(trainer, learns=True)
    assert (found.batch.input_ids >= 320).any()
    assert found.batch.scores.isfinite().all() and found.experience.values.isfinite().all()
    trainer.step(1)


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_values_stay_in_their_range_and_begin_in_its_middle(shared_trunk, tiny_world, runtime, tmp_path):
    options = dict(value_range=[2.0, 4.0], shared_trunk=shared_trunk, critic_learning_rate=0.3, learning_rate=0.1)
    trainer = make(tiny_world, runtime, tmp_path, critic_model=None, **options)
    first = iterate(trainer, learns=True)
    trainer.step(1)
    later = iterate(trainer, 2)
    for found, middle in ((first, True), (later, False)):
        values = found.experience.values[found.batch.response_mask]
        assert values.min() >= 2 and values.max() <= 4
        assert (values - 3.0).abs().max() < 0.9 or not middle
    assert not torch.equal(first.experience.values, later.experience.values)


def test_the_critic_may_take_several_steps_for_each_of_the_policy(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, critic_updates=3, ppo_epochs=1, minibatches=2)
    steps = dict.fromkeys(trainer.engines, 0)

    def counted(name, step):
        def counting(*arguments, **options):
            steps[name] += 1
            return step(*arguments, **options)

        return counting

    for name, engine in trainer.engines.items():
        engine.step = counted(name, engine.step)
    trainer.step(0)
    assert steps == {"actor": 2, "critic": 6}


def hinted(tmp_path, prompt: str | None = None) -> dict:
    """Rows whose hint tells their number, and a reward that is it.

    Args:
        prompt: of all rows, which then doesn't tell it; None for prompts of their own.
    """
    rows = [{"prompt": prompt or sentence(i, 5), "hint": ["sorry", "happy"][i % 2], "number": i % 2} for i in range(32)]
    path = tmp_path / "own_rewards.py"
    path.write_text("def own(prompts, responses, number, **columns):\n    return [float(n) for n in number]\n")
    return dict(train_data=[write_rows(tmp_path / "rows.jsonl", rows)], eval_data=[], rewards=functions(f"{path}:own"))


def test_a_critic_may_read_another_prompt(tiny_world, runtime, tmp_path):
    """Its values are those of a forward pass over that prompt and the response, at the response's own places."""
    trainer = make(tiny_world, runtime, tmp_path / "run", critic_prompt="{hint} {prompt}", **hinted(tmp_path))
    end_some_answers(trainer)
    found = iterate(trainer)
    batch = found.batch
    assert len({sum(row) for row in batch.response_mask.tolist()}) > 1
    for sample, values, mask in zip(batch.samples, found.experience.values, batch.response_mask, strict=True):
        prompt = trainer.data[sample.row].teacher_ids
        assert sample.columns["hint"] in trainer.tokenizer.decode(prompt)
        response = [token for token, ours in zip(sample.tokens, sample.response_mask, strict=True) if ours]
        with torch.no_grad():
            expected = trainer.engines["critic"].module(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(values[mask], expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_adds_nothing_gives_the_same_bits(tiny_world, runtime, tmp_path):
    runs = [make(tiny_world, runtime, tmp_path / str(i), critic_prompt=p) for i, p in enumerate((None, "{prompt}"))]
    for trainer in runs:
        for k in range(2):
            trainer.step(k)
    for name in ("actor", "critic"):
        ours, theirs = (trainer.engines[name].module.state_dict() for trainer in runs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_a_critic_reads_is_collated_once_for_values_and_once_for_a_step(
    tiny_world, runtime, tmp_path, monkeypatch
):
    sizes = dict(batch_size=8, micro_batch_size=4, ppo_epochs=1, minibatches=1, critic_updates=3)
    trainer = make(tiny_world, runtime, tmp_path / "run", critic_prompt="{hint} {prompt}", **sizes, **hinted(tmp_path))
    collated = []

    def counting(rows, pad_id):
        collated.append(len(rows))
        return collate_sft(rows, pad_id)

    monkeypatch.setattr(actor_critic, "collate_sft", counting)
    trainer.step(0)
    assert collated == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("prompt", "least", "most"), [("{hint} {prompt}", 0.8, 1.0), pytest.param(None, -1.0, 0.3, marks=pytest.mark.slow)]
)
def test_a_critic_foretells_what_only_its_prompt_says(prompt, least, most, tiny_world, runtime, tmp_path):
    changes = dict(
        critic_prompt=prompt, critic_learning_rate=1e-2, critic_lambda=1.0, value_clip=0.0, learning_rate=0.0
    )
    trainer = make(
        tiny_world, runtime, tmp_path / "run", critic_updates=4, **changes, **hinted(tmp_path, "say something")
    )
    found = [trainer.step(k)["explained_variance"] for k in range(12)]
    assert least < found[-1] <= most


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(value_range=[1.0]), "two numbers"),
        (dict(value_range=[1.0, 0.0]), "the lesser one first"),
        (dict(length_adaptive_alpha=0.4), "critic_lambda"),
        (dict(shared_trunk=True, critic_updates=2), "leave critic_updates at 1"),
        (dict(gae_level="turn"), "give --environment, and turn_rewards"),
        (dict(critic_prompt="{prompt}", shared_trunk=True), "leave out shared_trunk"),
        (dict(critic_prompt="no field"), "critic_prompt names no field"),
        (dict(critic_prompt="{prompt}", max_tokens_per_batch=4096), "give micro_batch_size"),
        (dict(policy_loss="dis", dual_clip=3.0), "policy_loss dis has no dual_clip"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(changes, words, tiny_world):
    with pytest.raises(UserError, match=words) as error:
        configure(PPOConfig, **settings_for("ppo", tiny_world, output_dir="unused", **changes))
    assert "\n" not in str(error.value)
