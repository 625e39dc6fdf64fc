"""SDPO (2601.20802): which responses have a demonstration, what the teacher reads, and what is learned."""

import copy

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.run_layout import TEACHER, checkpoints_of, model_in
from coati.samples import Sample
from coati.tracking import read_metrics
from coati.trainers.distill import DistillConfig, distill_trainer
from coati.trainers.sdpo import SDPOTrainer, find_demonstrations
from tests.conftest import functions, settings_for
from tests.trainers.steps import record_gradients
from tests.trainers.test_self_distillation import right_words, secrets  # noqa: F401


def make(world, runtime, output, **changes) -> SDPOTrainer:
    settings = settings_for("sdpo", world, output_dir=str(output), batch_size=4, **changes)
    trainer = distill_trainer(configure(DistillConfig, **settings), runtime)
    assert type(trainer) is SDPOTrainer
    return trainer


def response_of(sample: Sample) -> list[int]:
    return [token for token, ours in zip(sample.tokens, sample.response_mask, strict=True) if ours]


def sample(reward: float) -> Sample:
    found = Sample.of_texts("", "")
    found.score = reward
    return found


def test_a_demonstration_is_the_first_other_success_of_the_group():
    group = [sample(reward) for reward in (0.0, 1.0, 0.9, 2.0)]
    alone = [sample(reward) for reward in (0.0, 1.0, 0.0, 0.0)]
    none = [sample(0.0) for _ in range(4)]
    found = find_demonstrations([*group, *alone, *none], 4, least=1.0)
    assert [id(x) for x in found[:4]] == [id(group[place]) for place in (1, 3, 1, 1)]
    assert [x is alone[1] for x in found[4:8]] == [True, False, True, True] and found[5] is None
    assert found[8:] == [None] * 4


def test_the_teacher_reads_the_demonstration_in_its_prompt_and_then_the_same_response(
    tiny_world, runtime, tmp_path, monkeypatch
):
    trainer = make(tiny_world, runtime, tmp_path)
    batches, following = [], trainer.rollouts.next

    def ended(k):
        """What a successful response has for its last token counts as an end."""
        batches.append(following(k))
        success = next(s for s in batches[0][0].samples if s.total_reward >= 1.0)
        trainer.generation.sampler.ends.append(success.tokens[-1])
        return batches[0]

    monkeypatch.setattr(trainer.rollouts, "next", ended)
    readings, metrics = trainer.own_responses(0)
    samples, ends = batches[0][0].samples, trainer.generation.sampler.ends
    assert len(samples) == 16
    expected = {}
    for i, one in enumerate(samples):
        others = [s for s in samples[i // 4 * 4 : i // 4 * 4 + 4] if s is not one and s.total_reward >= 1.0]
        expected[tuple(one.tokens)] = (one, [t for t in response_of(others[0]) if t not in ends] if others else None)
    seen = learned = 0
    for reading in readings:
        student, teacher = reading.student, reading.teacher
        for row in range(len(student.input_ids)):
            one, demonstration = expected[tuple(student.input_ids[row][student.attention_mask[row]].tolist())]
            read = teacher.input_ids[row][teacher.attention_mask[row]].tolist()
            seen += 1
            if demonstration is None:
                assert read == one.tokens and not student.loss_mask[row].any() and not teacher.loss_mask[row].any()
                continue
            learned += 1
            response = response_of(one)
            assert student.input_ids[row][student.loss_mask[row]].tolist() == response
            assert teacher.input_ids[row][teacher.loss_mask[row]].tolist() == response
            prompt = read[: len(read) - len(response)]
            data = trainer.data[one.row]
            assert prompt == data.teacher_ids + demonstration + data.teacher_rest
            assert "never" in trainer.tokenizer.decode(data.teacher_ids)
            assert "thank" in trainer.tokenizer.decode(data.teacher_rest)
    assert seen == 16 and 0 < learned < 16
    assert metrics["demonstrated"] == learned / 16
    assert metrics["success"] == sum(s.total_reward >= 1.0 for s in samples) / 16


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_the_gradient_is_that_of_a_loop_over_tokens(divergence, tiny_world, runtime, tmp_path, monkeypatch):
    """In float64, of both models' distributions at every token of the responses that have a demonstration."""
    changes = dict(divergence=divergence, max_grad_norm=0.0, teacher_ema=0.3)
    trainer = make(tiny_world, runtime, tmp_path, **changes)
    trainer.step(0)  # the average is another model by now
    student, master = (copy.deepcopy(e.module).double() for e in (trainer.actor, trainer.teachers[None]))
    gradients: dict[str, torch.Tensor] = {}
    record_gradients("actor", trainer.actor, gradients, monkeypatch)
    seen, following = [], trainer.rollouts.next
    monkeypatch.setattr(trainer.rollouts, "next", lambda k: (seen.append(following(k)), seen[-1])[1])
    loss = trainer.step(1)["loss"]

    def log_probs(model, prompt, response):
        return model.transformer(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    samples, divergences = seen[0][0].samples, []
    for one, demonstration in zip(samples, find_demonstrations(samples, 4, 1.0), strict=True):
        if demonstration is None:
            continue
        data, response = trainer.data[one.row], response_of(one)
        told = [t for t in response_of(demonstration) if t not in trainer.generation.sampler.ends]
        s = log_probs(student, one.tokens[: -len(response)], response)
        with torch.no_grad():
            t = log_probs(master, data.teacher_ids + told + data.teacher_rest, response)
        first, second = (s, t) if divergence == "reverse" else (t, s)
        divergences.append((first.exp() * (first - second)).sum(-1))
    expected = torch.cat(divergences).mean()
    assert expected > 1e-4 and loss == pytest.approx(expected.item(), rel=1e-3)
    expected.backward()
    for name, p in student.named_parameters():
        found = gradients[f"actor.{name}"].double()
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_groups_without_a_success_teach_nothing(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, success_reward=100.0, learning_rate=1.0)
    before = copy.deepcopy(trainer.actor.module.state_dict())
    metrics = trainer.step(0)
    assert (metrics["success"], metrics["demonstrated"], metrics["loss"]) == (0.0, 0.0, 0.0)
    after = trainer.actor.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("changes", [{}, dict(plugin="zero1", precision="bf16"), dict(lora_rank=2)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(changes, tiny_world, runtime, tmp_path):
    changes = dict(steps=4, save_every=2, keep_checkpoints=9) | changes
    whole = make(tiny_world, runtime, tmp_path / "whole", **changes)
    whole.train()
    checkpoint = checkpoints_of(tmp_path / "whole") / "step-00000002"
    assert model_in(checkpoint, TEACHER).is_dir()
    resumed = make(tiny_world, runtime, tmp_path / "resumed", **changes, resume=str(checkpoint))
    stored = {name: x.clone() for name, x in resumed.actor.state_dict().items()}
    resumed.train()
    for name in ("actor", "teacher"):
        found, expected = ((one.engines | one.frozen)[name].state_dict() for one in (resumed, whole))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(x, stored[name]) for name, x in resumed.actor.state_dict().items())
    rows = read_metrics(tmp_path / "whole")
    assert {"eval/reward", "success", "demonstrated", "loss"} <= {name for row in rows for name in row}
    assert not any("eval/divergence" in row for row in rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher_prompt="{prompt}"), r"has \{success\} once"),
        (dict(teacher_prompt="{success} {success}"), r"has \{success\} once"),
        (dict(group_size=1), "group_size"),
        (dict(temperature=0.0), "must differ"),
        (dict(on_policy_share=0.5), "leave on_policy_share at 1"),
        (dict(rewards=[]), "reward"),
        (dict(normalize_reward=True), "leave out normalize_reward"),
        (dict(plugin="gemini", precision="bf16"), "teacher_ema is for .*ddp, zero1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        make(tiny_world, runtime, tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "least", "most"), [("{prompt} hint {success}", 0.9, 1.0), ("{success} {prompt}", 0.0, 0.3)], ids=str
)
def test_a_policy_learns_what_its_successes_say(prompt, least, most, secrets, runtime, tmp_path):  # noqa: F811
    """A model that follows hints and says any of eight words finds the word that belongs to each question, from the
    reward of the responses that happened to be right. Where they stand in no hint, it doesn't heed them."""
    path = tmp_path / "own_rewards.py"
    body = "[float(r == s) for r, s in zip(responses, secret)]"
    path.write_text(f"def own(prompts, responses, secret, **columns):\n    return {body}\n")
    settings = secrets | dict(algorithm="sdpo", group_size=16, teacher_ema=0.0, rewards=functions(f"{path}:own"))
    settings |= dict(steps=100, batch_size=16, micro_batch_size=256, generation_batch_size=256, learning_rate=1e-3)
    settings |= dict(teacher_prompt=prompt, max_new_tokens=2, warmup=0.0, progress="off")
    trainer = distill_trainer(configure(DistillConfig, **settings, output_dir=str(tmp_path / "run")), runtime)
    assert 0.05 < right_words(trainer.actor.module).mean() < 0.3
    rewards = [trainer.step(k)["reward"] for k in range(trainer.total_steps)]
    assert least <= right_words(trainer.actor.module).mean() <= most
    assert (sum(rewards[-5:]) / 5 > 0.8) == (least > 0)
