"""Distillation: which rows it learns from, what it measures, and what it refuses."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor
from coati.tracking import read_metrics
from coati.trainers.distill import DistillConfig, DistillTrainer
from tests.conftest import functions, settings_for


def make(world, runtime, output, **changes) -> DistillTrainer:
    settings = settings_for("distill", world, output_dir=str(output), **changes)
    return DistillTrainer(configure(DistillConfig, **settings), runtime)


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.actor.module.state_dict().items()}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_each_row_is_responded_to_or_learned_as_it_is(share, tiny_world, runtime, tmp_path, monkeypatch):
    """Of an epoch, every row once."""
    trainer = make(tiny_world, runtime, tmp_path, on_policy_share=share)
    prompts = [tuple(trainer.data[i].input_ids) for i in range(len(trainer.data))]
    learned = []
    teach = trainer.teach
    monkeypatch.setattr(trainer, "teach", lambda readings: learned.append(readings) or teach(readings))
    for k in range(len(prompts) // 8):
        trainer.step(k)
    own, demonstrated = [], []
    for readings in learned:
        for batch in (reading.student for reading in readings):
            for ids, mask, real in zip(batch.input_ids, batch.loss_mask, batch.attention_mask, strict=True):
                prompt = tuple(ids[: int(mask.int().argmax())].tolist())
                rows = [row for row, text in enumerate(prompts) if text == prompt]
                response = ids[mask].tolist()
                given = trainer.demonstrations and any(
                    trainer.demonstrations[row].input_ids[len(prompt) :] == response for row in rows
                )
                (demonstrated if given else own).append(prompt)
                assert mask.sum() > 0 and not mask[~real].any()
    assert len(own) == share * len(prompts)
    assert sorted(own + demonstrated) == sorted(prompts)


def test_rewards_are_measured_where_there_are_some_and_change_nothing(tiny_world, runtime, tmp_path):
    found = []
    for rewards in ([], functions(tiny_world["rewards"] + ":length")):
        trainer = make(tiny_world, runtime, tmp_path / str(len(rewards)), rewards=rewards, steps=2)
        trainer.train()
        rows = read_metrics(tmp_path / str(len(rewards)))
        assert all(("reward" in row or "eval/reward" in row) == bool(rewards) for row in rows)
        assert {"eval/divergence", "eval/response_length"} <= rows[0].keys() and "loss" in rows[1]
        found.append(weights(trainer))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_teacher_stays_as_it_is_and_an_adapter_is_all_that_a_lora_student_changes(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, lora_rank=2, steps=2)
    teacher = {name: x.clone() for name, x in trainer.teachers[None].module.state_dict().items()}
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(x, teacher[name]) for name, x in trainer.teachers[None].module.state_dict().items())
    changed = {name for name, x in weights(trainer).items() if not torch.equal(x, before[name])}
    assert changed and all("lora" in name for name in changed)


def test_the_divergence_of_the_evaluation_is_that_of_the_students_responses(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, divergence="reverse", temperature=0.0)
    metrics, rows = trainer.evaluate()
    student, teacher = trainer.actor.module.transformer, trainer.teachers[None].module.transformer
    found = []
    for i, row in enumerate(rows):
        prompt = trainer.eval_data[i].input_ids
        ids = torch.tensor([prompt])
        divergences = []
        for _ in range(int(row["response_length"])):  # greedy, so a token after the other
            with torch.no_grad():
                s, t = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (student, teacher))
            divergences.append((s.exp() * (s - t)).sum().item())
            ids = torch.cat([ids, s.argmax()[None, None]], 1)
        found.append(sum(divergences) / len(divergences))
        assert row["divergence"] == pytest.approx(found[-1], rel=1e-4)
    assert min(found) > 0.1 and metrics["divergence"] > 0.1


def test_data_without_responses_is_for_a_share_of_1_only(tiny_world, runtime, tmp_path):
    data = dict(train_data=[tiny_world["prompts"]], eval_data=[])
    make(tiny_world, runtime, tmp_path / "own", on_policy_share=1.0, **data).step(0)
    with pytest.raises(UserError, match=r"prompts\.jsonl"):
        make(tiny_world, runtime, tmp_path / "half", on_policy_share=0.5, **data)


def test_a_student_of_random_weights_has_the_shape_of_the_config_and_the_teacher_its_own(tiny_world, runtime, tmp_path):
    changes = dict(model=None, model_config=tiny_world["model_config"], tokenizer=tiny_world["teacher"])
    trainer = make(tiny_world, runtime, tmp_path, steps=1, **changes)
    assert (trainer.actor.module.config.hidden_size, trainer.teachers[None].module.config.hidden_size) == (32, 48)
    trainer.train()


@pytest.mark.parametrize("more", [{}, dict(teacher_prompt="{prompt} {response}")], ids=["", "another prompt"])
def test_a_student_may_sample_ids_that_its_teacher_has_not(more, tiny_world, runtime, tmp_path):
    """Of an output layer that is padded to another size; they are no tokens, so the teacher reads padding there."""
    actor = Actor(config=LlamaConfig.from_pretrained(tiny_world["policy"], vocab_size=328))
    actor.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(tmp_path / "student")
    changes = dict(model=str(tmp_path / "student"), on_policy_share=1.0, temperature=3.0, batch_size=40)
    trainer = make(tiny_world, runtime, tmp_path / "run", max_new_tokens=16, **changes | more)
    seen, teach = [], trainer.teach
    trainer.teach = lambda readings: seen.extend(readings) or teach(readings)
    metrics = trainer.step(0)
    assert any((reading.student.input_ids >= 320).any() for reading in seen) and metrics["loss"] > 0
    for reading in seen:
        read = trainer.known_to(None, reading.teacher).input_ids
        known = reading.teacher.input_ids < 320
        assert torch.equal(read[known], reading.teacher.input_ids[known]) and (read[~known] == 2).all()


def save_teacher(world, folder, **tokens):
    """The teacher with a tokenizer of more tokens, or of a token by another name."""
    Actor(world["teacher"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    tokenizer.add_tokens(list(tokens.values()))
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_teacher_of_another_vocabulary_is_refused_by_its_first_other_token(tiny_world, runtime, tmp_path):
    ours = len(AutoTokenizer.from_pretrained(tiny_world["tokenizer"]))
    more = save_teacher(tiny_world, tmp_path / "more", new="<think>")
    with pytest.raises(
        UserError, match=f"teacher in .*more has another vocabulary than the student .*token {ours}, '<th"
    ):
        make(tiny_world, runtime, tmp_path / "run", teacher=more)
    student = save_teacher(tiny_world, tmp_path / "student", new="<think>")
    with pytest.raises(UserError, match=r"'<think>', is missing there"):
        make(tiny_world, runtime, tmp_path / "run", model=student, tokenizer=student)
    other = save_teacher(tiny_world, tmp_path / "other", new="<tool>")
    with pytest.raises(UserError, match=r"'<think>', is missing there"):
        make(tiny_world, runtime, tmp_path / "run", model=student, tokenizer=student, teacher=other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher=None), "give --teacher FOLDER"),
        (dict(model=None), "give --model FOLDER"),
        (dict(on_policy_share=0.3), "on_policy_share 0.3 of batch_size 8 is 2.4 prompts.* multiple of 0.125"),
        (dict(beta=0.3, divergence="forward"), "beta belongs to divergence jsd"),
        (dict(reward_clip=1.0), "rewards stand in no loss here.*leave out"),
        (dict(num_beams=2), "leave num_beams at 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=words):
        make(tiny_world, runtime, tmp_path, **changes)


def test_an_output_layer_of_another_size_cannot_be_split(tiny_world, runtime, tmp_path, monkeypatch):
    """Processes would hold ranges of other tokens."""
    trainer = make(tiny_world, runtime, tmp_path)
    trainer.config.parallel.tensor_parallel = 2
    sizes = iter((328, 320, 328))
    monkeypatch.setattr("coati.trainers.distill.vocabulary", lambda _: next(sizes))
    with pytest.raises(UserError, match=r"320 rows and the teacher's 328.*leave out tensor_parallel"):
        trainer.build_models()
