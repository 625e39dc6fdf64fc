"""A teacher that reads another prompt than its student, and that is a copy or an average of it (SDFT, 2601.19897)."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor
from coati.run_layout import TEACHER, checkpoints_of, model_in, newest_checkpoint
from coati.trainers.distill import DistillConfig, DistillTrainer
from tests.conftest import settings_for, write_rows
from tests.trainers.test_theory import TEMPLATE

PROMPT = "never {prompt} lamp {response}"
SELF = dict(teacher="self", teacher_prompt=PROMPT, on_policy_share=1.0, divergence="forward")


def make(world, runtime, output, **changes) -> DistillTrainer:
    settings = settings_for("distill", world, output_dir=str(output), **changes)
    return DistillTrainer(configure(DistillConfig, **settings), runtime)


def weights(engine):
    return {name: tensor.clone() for name, tensor in engine.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def tokens_of(batch, row: int) -> tuple[list[int], list[int]]:
    """A row's prompt and response."""
    ids, mask, real = batch.input_ids[row], batch.loss_mask[row], batch.attention_mask[row]
    return ids[real & ~mask].tolist(), ids[mask].tolist()


@pytest.mark.parametrize(
    "changes", [{}, dict(skip_tokens=2), dict(divergence="reverse", max_tokens_per_batch=208)], ids=str
)
def test_a_prompt_that_adds_nothing_changes_nothing(changes, tiny_world, runtime, tmp_path):
    found = []
    for prompt in (None, "{prompt}"):
        output = tmp_path / str(prompt is None)
        trainer = make(tiny_world, runtime, output, on_policy_share=1.0, teacher_prompt=prompt, steps=2, **changes)
        metrics = [trainer.step(k) for k in range(2)]
        assert metrics[1]["loss"] > 0
        found.append((weights(trainer.actor), [m["loss"] for m in metrics], trainer.evaluate()))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("teacher", ["self", "another"])
@pytest.mark.parametrize("skipped", [0, 3])
def test_divergences_are_those_of_responses_after_each_models_own_prompt(
    teacher, skipped, tiny_world, runtime, tmp_path
):
    """A slow loop in float64, a token after the other."""
    changes = dict(skip_tokens=skipped, temperature=0.0, divergence="reverse")
    changes |= dict(teacher="self") if teacher == "self" else {}
    trainer = make(tiny_world, runtime, tmp_path, **SELF | dict(teacher=tiny_world["teacher"]) | changes)
    for parameter in trainer.actor.module.parameters():
        parameter.data.mul_(1.3)  # the copy is another model by now
    metrics, rows = trainer.evaluate()
    student, master = trainer.actor.module.transformer.double(), trainer.teachers[None].module.transformer.double()
    found = []
    for i, row in enumerate(rows):
        sample, divergences = trainer.eval_data[i], []
        asked, taught = torch.tensor([sample.input_ids]), torch.tensor([sample.teacher_ids])
        assert taught.shape[1] > asked.shape[1]
        for place in range(int(row["response_length"])):  # greedy, so a token after the other
            with torch.no_grad():
                s, t = (m(ids).logits[0, -1].log_softmax(-1) for m, ids in ((student, asked), (master, taught)))
            if place >= skipped:
                divergences.append((s.exp() * (s - t)).sum().item())
            asked, taught = (torch.cat([ids, s.argmax()[None, None]], 1) for ids in (asked, taught))
        found += [sum(divergences) / len(divergences)] if divergences else []
        assert row["divergence"] == (pytest.approx(found[-1], rel=1e-3) if divergences else None)
    assert len(found) >= 3 and min(found) > 0.001 and metrics["divergence"] > 0.001


def test_the_teacher_reads_the_rows_of_its_own_prompts_data(tiny_world, runtime, tmp_path):
    """And the same response as the student."""
    trainer = make(tiny_world, runtime, tmp_path, **SELF)
    readings, _ = trainer.own_responses(0)
    by_prompt = {tuple(sample.input_ids): sample.teacher_ids for sample in trainer.data}
    seen = 0
    for reading in readings:
        student, teacher = reading.student, reading.teacher
        for row in range(len(student.input_ids)):
            (prompt, response), (other, same) = (tokens_of(side, row) for side in (student, teacher))
            assert other == by_prompt[tuple(prompt)] and same == response and response
            seen += 1
    assert seen == 8


def test_a_teachers_longer_rows_fit_into_a_micro_batch_too(tiny_world, runtime, tmp_path):
    """The student's rows alone would fit six at a time."""
    trainer = make(tiny_world, runtime, tmp_path, **SELF | dict(max_tokens_per_batch=240, teacher_prompt=PROMPT * 2))
    readings, _ = trainer.own_responses(0)
    assert max(reading.teacher.input_ids.numel() for reading in readings) <= 240
    assert sum(len(reading.student.input_ids) for reading in readings) == 8 > len(readings) > 1


@pytest.mark.parametrize(
    "changes",
    [dict(teacher_ema=0.25), dict(teacher_ema=0.0), dict(teacher_ema=1.0), dict(teacher_ema=0.25, lora_rank=2)],
    ids=str,
)
def test_the_teacher_is_an_average_of_the_student(changes, tiny_world, runtime, tmp_path):
    """phi <- alpha theta + (1 - alpha) phi after each step (algorithm 1), from the student's start."""
    trainer, rate = make(tiny_world, runtime, tmp_path, **SELF | changes), changes["teacher_ema"]
    average = {name: x.double() for name, x in weights(trainer.actor).items()}
    own = weights(trainer.teachers[None])
    assert all(torch.equal(own[name].double(), average[name]) for name in own)
    for k in range(3):
        trainer.step(k)
        now = weights(trainer.actor)
        average = {name: rate * now[name].double() + (1 - rate) * x for name, x in average.items()}
        for name, found in weights(trainer.teachers[None]).items():
            torch.testing.assert_close(found.double(), average[name], rtol=1e-5, atol=1e-7)
    moved = {name for name, x in weights(trainer.teachers[None]).items() if not torch.equal(x, own[name])}
    assert bool(moved) == (rate > 0) and all("lora" in name for name in moved) == bool(
        "lora_rank" in changes or rate == 0
    )


def test_an_average_of_low_precision_weights_moves_by_less_than_their_rounding(tiny_world, runtime, tmp_path):
    """In bf16, an addition of a thousandth is lost."""
    changes = dict(plugin="zero1", precision="bf16", learning_rate=1e-4, teacher_ema=0.01)
    trainer = make(tiny_world, runtime, tmp_path, **SELF | changes)
    before = weights(trainer.teachers[None])
    for k in range(2):
        trainer.step(k)
    after = weights(trainer.teachers[None])
    now = weights(trainer.actor)
    assert {x.dtype for x in now.values()} == {torch.bfloat16}
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(moved) > len(after) / 2 and all(after[name].dtype == torch.float32 for name in moved)
    working = dict(trainer.teachers[None].module.named_parameters())
    assert all(torch.equal(working[name], after[name].bfloat16()) for name in moved if name in working)


HALF = dict(plugin="zero1", precision="bf16")


@pytest.mark.parametrize("changes", [{}, HALF, dict(lora_rank=2), HALF | dict(lora_rank=2)], ids=str)
def test_a_resumed_average_is_the_uninterrupted_one_to_the_last_bit(changes, tiny_world, runtime, tmp_path):
    changes = SELF | dict(teacher_ema=0.1, steps=4, save_every=2, keep_checkpoints=9) | changes
    whole = make(tiny_world, runtime, tmp_path / "whole", **changes)
    whole.train()
    checkpoint = checkpoints_of(tmp_path / "whole") / "step-00000002"
    assert model_in(checkpoint, TEACHER).is_dir()
    resumed = make(tiny_world, runtime, tmp_path / "resumed", **changes, resume=str(checkpoint))
    assert resumed.steps_done == 2
    stored = weights(resumed.teachers[None])
    resumed.train()
    for name in ("actor", "teacher"):
        found, expected = (weights((one.engines | one.frozen)[name]) for one in (resumed, whole))
        assert_equal(found, expected)
    assert any(not torch.equal(x, stored[name]) for name, x in weights(resumed.teachers[None]).items())
    assert newest_checkpoint(checkpoints_of(tmp_path / "resumed")).name == "step-00000004"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher_ema=0.1), "teacher_ema moves a copy of the student: give teacher self"),
        (dict(teacher="self", model=None), "teacher self is a copy .* give --model FOLDER"),
        (dict(teacher="self", teacher_ema=0.1, plugin="gemini", precision="bf16"), "teacher_ema is for .*ddp, zero1"),
        (dict(teacher_prompt=PROMPT, on_policy_share=0.5), "teacher_prompt is for .*leave on_policy_share at 1"),
        (dict(teacher_prompt="{hint} {prompt}", on_policy_share=1.0), r"sft\.jsonl line 1: no field `hint`"),
        (dict(teacher_prompt=PROMPT, sequence_parallel=2), "leave out sequence_parallel and split_sequence"),
        (dict(teacher_prompt="{prompt.x}"), "alone in braces"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=words):
        make(tiny_world, runtime, tmp_path, **dict(on_policy_share=1.0) | changes)


def test_a_teachers_prompt_that_is_too_long_for_its_positions_is_refused(tiny_world, runtime, tmp_path):
    """A model of absolute positions would read nonsense; rotary ones go on, and their limit is only said."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    short = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    Actor(config=short).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    changes = dict(model=str(tmp_path / "short"), tokenizer=str(tmp_path / "short"), max_length=500)
    make(tiny_world, runtime, tmp_path / "fits", **SELF | changes | dict(teacher_prompt="{prompt} {response}"))
    with pytest.raises(UserError, match=r"rows of this run have up to \d+ tokens, and GPT2LMHeadModel has .*64"):
        long = "{prompt} {prompt} {prompt} {response} {response} {response} {prompt}"
        make(tiny_world, runtime, tmp_path / "run", **SELF | changes | dict(teacher_prompt=long))


QUESTIONS, WORDS = [f"q{i}" for i in range(8)], [f"w{i}" for i in range(8)]
VOCABULARY = ("<eos>", "<pad>", "hint", *QUESTIONS, *WORDS)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> dict:
    """Settings for a policy that says any word after a question, and after a hint the word of the hint; and rows with
    the word that belongs to each question."""
    root = tmp_path_factory.mktemp("secrets")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    actor = Actor(config=LlamaConfig(vocab_size=len(VOCABULARY), eos_token_id=0, pad_token_id=1, **sizes))
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3)
    for _ in range(300):
        question, word = torch.randint(3, 11, (64, 1)), torch.randint(11, 19, (64, 1))
        hint, end = torch.full_like(question, 2), torch.zeros_like(question)
        hinted = torch.cat([question, hint, word, word, end], 1)
        plain = torch.cat([question, word, end, end, end], 1)
        targets = torch.tensor([[0, 0, 0, 1, 1]] * 64 + [[0, 1, 1, 0, 0]] * 64, dtype=torch.bool)
        loss = -actor(torch.cat([hinted, plain]))[targets].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    actor.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    rows = [{"prompt": question, "secret": word} for question, word in zip(QUESTIONS, reversed(WORDS), strict=True)]
    return dict(
        model=str(root / "policy"),
        train_data=[write_rows(root / "rows.jsonl", rows * 8)],
        cache_dir=str(root / "cache"),
    )


@torch.no_grad()
def right_words(model) -> torch.Tensor:
    """The probability of each question's word, without a hint, `[questions]`."""
    rows = torch.tensor([[3 + i, 11 + 7 - i] for i in range(8)])
    return model(rows)[:, 1].exp()


@pytest.mark.parametrize(
    ("prompt", "least", "most"), [("{prompt} hint {secret}", 0.9, 1.0), ("{prompt}", 0.0, 0.3)], ids=["hint", "none"]
)
@pytest.mark.parametrize(
    "changes",
    [
        dict(divergence="reverse"),
        pytest.param(dict(teacher_ema=0.002, learning_rate=1e-3), marks=pytest.mark.slow),
    ],
    ids=["start", "average"],
)
def test_a_student_internalizes_what_stands_in_its_teachers_prompt(
    changes, prompt, least, most, secrets, runtime, tmp_path
):
    """It knows the words of the hints afterwards, without a hint; without one, its teacher can't tell it any."""
    settings = secrets | dict(teacher="self", divergence="forward", output_dir=str(tmp_path), max_new_tokens=2)
    settings |= dict(steps=60, batch_size=64, micro_batch_size=64, generation_batch_size=64, learning_rate=3e-3)
    settings |= dict(teacher_prompt=prompt, warmup=0.0, progress="off") | changes
    trainer = DistillTrainer(configure(DistillConfig, **settings), runtime)
    assert 0.05 < right_words(trainer.actor.module).mean() < 0.3
    for k in range(trainer.total_steps):
        trainer.step(k)
    assert least <= right_words(trainer.actor.module).mean() <= most
