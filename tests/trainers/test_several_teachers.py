"""Distillation from several teachers: each row is read by the one that it names."""

import json
from pathlib import Path

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor
from coati.trainers.batching import Batching
from coati.trainers.distill import DistillConfig, DistillTrainer
from tests.conftest import settings_for, write_rows
from tests.trainers.steps import Variation, run_step

NAMES = ("math", "code")


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory) -> dict:
    """With a second teacher, of other weights and another width, and rows of both."""
    from transformers import AutoTokenizer, LlamaConfig

    root = tmp_path_factory.mktemp("teachers")
    config = LlamaConfig.from_pretrained(tiny_world["teacher"])
    config.hidden_size = 64
    torch.manual_seed(4)
    second = Actor(config=config)
    torch.nn.init.normal_(second.model.lm_head.weight, std=0.3)
    second.save_pretrained(root / "second")
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(root / "second")
    rows = [row | {"domain": NAMES[i % 5 < 2]} for i, row in enumerate(rows_of(tiny_world["sft"]))]
    paths = {name: write_rows(root / f"{name}.jsonl", [r for r in rows if r["domain"] == name]) for name in NAMES}
    evaluated = [row | {"domain": NAMES[i % 2]} for i, row in enumerate(rows_of(tiny_world["sft_eval"]))]
    paths["sft"], paths["sft_eval"] = write_rows(root / "rows.jsonl", rows), write_rows(root / "eval.jsonl", evaluated)
    return tiny_world | paths | {"teachers": {"math": tiny_world["teacher"], "code": str(root / "second")}}


def make(world, runtime, output, **changes) -> DistillTrainer:
    both = dict(teacher=None, teachers=world["teachers"], teacher_column="domain", learning_rate=0.0, max_grad_norm=0.0)
    settings = settings_for("distill", world, output_dir=str(output), **both | changes)
    return DistillTrainer(configure(DistillConfig, **settings), runtime)


@pytest.mark.parametrize(
    "changes",
    [
        dict(on_policy_share=0.0),
        dict(on_policy_share=1.0),
        dict(on_policy_share=1.0, teacher_prompt="never {prompt} {response}"),
    ],
    ids=["given responses", "its own", "another prompt"],
)
def test_the_loss_is_that_of_the_two_halves_with_their_own_teachers(changes, world, runtime, tmp_path):
    """Of an iteration with all rows: sums over tokens add up, and so do gradients."""
    changes = changes | dict(temperature=0.0, eval_data=[])
    metrics, gradients = whole_step(make(world, runtime, tmp_path / "both", batch_size=40, **changes))
    halves = []
    for name, rows in zip(NAMES, (24, 16), strict=True):
        alone = dict(teachers=None, teacher_column=None, teacher=world["teachers"][name], train_data=[world[name]])
        trainer = make(world, runtime, tmp_path / name, batch_size=rows, **changes | alone)
        assert len(trainer.data) == rows
        readings = trainer.own_responses(0)[0] + trainer.demonstrated(0)
        tokens = sum(int(reading.student.loss_mask.sum()) for reading in readings)
        halves.append((tokens, *whole_step(trainer)))
    total = sum(tokens for tokens, _, _ in halves)
    expected = sum(tokens * found["loss"] for tokens, found, _ in halves) / total
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        expected = sum(tokens * of_half[name] for tokens, _, of_half in halves) / total
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def whole_step(trainer):
    """Metrics and gradients of an iteration in micro-batches of odd sizes."""
    return run_step(trainer, Variation(order=tuple(range(len(trainer.data))), micro_batch_size=7))


def test_the_evaluation_compares_each_response_with_its_own_teacher(world, runtime, tmp_path):
    trainer = make(world, runtime, tmp_path, on_policy_share=1.0, temperature=0.0)
    _, rows = trainer.evaluate()
    student, found = trainer.actor.module.transformer.double(), []
    for i, row in enumerate(rows):
        teacher = trainer.teachers[NAMES[i % 2]].module.transformer.double()
        ids, divergences = torch.tensor([trainer.eval_data[i].input_ids]), []
        for _ in range(int(row["response_length"])):
            with torch.no_grad():
                s, t = log_probs(student, ids), log_probs(teacher, ids)
                m = torch.logaddexp(s, t) - torch.tensor(2.0).log()
            divergences.append(0.5 * sum((p.exp() * (p - m)).sum().item() for p in (s, t)))
            ids = torch.cat([ids, s.argmax()[None, None]], 1)
        found.append(sum(divergences) / len(divergences))
        assert row["divergence"] == pytest.approx(found[-1], rel=1e-4)
    assert len(found) == 4 and min(found) > 0.01


def log_probs(model, ids):
    return model(ids).logits[0, -1].log_softmax(-1)


def test_one_named_teacher_is_the_only_one(world, runtime, tmp_path):
    found = []
    for changes in (
        dict(teachers={"math": world["teacher"]}),
        dict(teachers=None, teacher_column=None, teacher=world["teacher"]),
    ):
        trainer = make(world, runtime, tmp_path / str(len(found)), train_data=[world["math"]], eval_data=[], **changes)
        found.append(trainer.step(0)["loss"])
    assert found[0] == found[1] > 0


class TwoRanks:
    """What a rank sees of two: `gather` gives what it has, and what the other has."""

    rank, world_size = 0, 2

    def __init__(self, others: list):
        self.others = iter(others)

    def gather(self, own):
        return [own, next(self.others)]


def test_every_rank_has_equally_many_micro_batches_of_each_teacher():
    """Models whose weights are sharded are called by all ranks at once."""
    ranks = TwoRanks([["a", "c"], 1, 0, 2])
    parts = Batching(ranks, 2).split_by_teacher([5, 9, 3, 7, 8], ["b", "a", "b", "b", "a"])
    assert [(part.teacher, part.rows, part.is_real) for part in parts] == [
        ("a", [1, 4], True),
        ("b", [3, 0], True),
        ("b", [2], True),
        ("c", [2], False),
        ("c", [2], False),
    ]
    ranks = TwoRanks([["a"], 3])
    by_tokens = Batching(ranks, 9, max_tokens=10).split_by_teacher([5, 9, 3], ["a", "a", "a"])
    assert [part.rows for part in by_tokens] == [[1], [0, 2], [2]] and not by_tokens[2].is_real


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"domain": None}], r"line 2: no field `domain`, which names the row's teacher"),
        ([{"domain": "law"}], r"line 2: `domain` is 'law', and the teachers are math, code"),
        ([{"domain": "math"}], r"no row of train_data has the domain 'code': leave this teacher out"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rows_and_teachers_must_name_each_other(rows, words, share, world, runtime, tmp_path):
    good = {"prompt": "red", "completion": "blue", "domain": "math"}
    source = write_rows(tmp_path / "rows.jsonl", [good, *(good | row for row in rows)])
    with pytest.raises(UserError, match=words):
        make(world, runtime, tmp_path / "run", train_data=[source], on_policy_share=share)


def test_the_teachers_field_may_hold_numbers_and_is_not_said_to_be_unused(world, runtime, tmp_path, capsys):
    rows = [{"prompt": f"red {i}", "completion": "blue", "domain": i % 2} for i in range(8)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    teachers = {str(i): path for i, path in enumerate(world["teachers"].values())}
    changes = dict(train_data=[source], eval_data=[], teachers=teachers)
    trainer = make(world, runtime, tmp_path / "run", on_policy_share=0.5, **changes)
    assert trainer.demonstrations.teachers_of([0, 1, 2]) == ["0", "1", "0"] and "domain" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher="folder"), "teacher is of all rows, and teachers of some each"),
        (dict(teacher_column=None), "teachers and teacher_column go together"),
        (dict(teachers=None), "teachers and teacher_column go together"),
        (dict(teachers={}), "one at least"),
        (dict(teachers={"math": "self"}), "a copy of the student is --teacher self alone"),
        (dict(teacher_ema=0.1), "teacher_ema moves a copy of the student"),
        (dict(teachers=["a"]), "it takes a mapping"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words, world, runtime, tmp_path):
    with pytest.raises(UserError, match=words):
        make(world, runtime, tmp_path, **changes)


def test_every_teacher_needs_the_students_vocabulary(world, runtime, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    tokenizer.add_tokens(["<new>"])
    Actor(world["teacher"]).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    teachers = world["teachers"] | {"code": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"teacher in .*other has another vocabulary than the student"):
        make(world, runtime, tmp_path / "run", teachers=teachers)


def test_a_folder_that_is_missing_is_named(world, tmp_path):
    from coati.trainers.paths import check_paths

    teachers = {"math": world["teacher"], "code": "./gone/teacher"}
    config = configure(DistillConfig, teachers=teachers, teacher_column="domain", output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"algorithm.teachers ./gone/teacher: there is no such folder"):
        check_paths(config)
