"""One real optimizer step of a trainer in many ways that must not matter, and what it gave: metrics and gradients."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from coati.config import configure
from coati.rollout import Experience, RolloutBatch, prompt_of
from tests.conftest import settings_for, trainer_classes, write_rows

# name: the algorithm, the model's architecture, and settings that exercise more of the loss. A new trainer joins here.
# gpt2's positions are absolute: llama's are relative, so that counting them from the padding on would change nothing.
COOL = dict(temperature=0.2)  # answers that differ, though most are like the greedy one
OF_ANSWERS = dict(policy_loss="gspo", clip_low=0.02, clip_high=0.02)
OF_ANSWERS |= dict(weights="sequence", reject="geometric", off_policy_bound=0.01)
OF_TOKENS = dict(policy_loss="cispo", clip_low=0.5, clip_high=0.5, kl_in="reward", kl_coefficient=0.1)
OF_TOKENS |= dict(aggregation="token")
OF_SAO = dict(policy_loss="dis", clip_low=0.2, clip_high=0.2, length_adaptive_alpha=1.5, critic_lambda=1.0)
OF_SAO |= dict(whiten_advantages=False)
OF_BPCO = dict(policy_loss="dppo", clip_low=0.001, clip_high=0.001, aggregation="sum", length_adaptive_alpha=0.4)
OF_BPCO |= dict(critic_lambda=1.0, value_range=[-2.0, 3.0], value_clip=0.5, whiten_advantages=False)
OF_BPCO |= dict(critic_prompt="thank {prompt}")
CENTERED = dict(policy_loss="cispo", clip_low=0.5, clip_high=0.5, score_centering=9)
WITH_RESPONSE = dict(on_policy_share=1.0, teacher="self", teacher_prompt="{response} thank {prompt}", skip_tokens=1)
TRAINERS = {
    "sft": ("sft", "gpt2", {}),
    "reward": ("reward", "gpt2", dict(label_smoothing=0.1, centering=0.01)),
    "reward, objectives": ("reward", "gpt2", dict(objectives=["verbosity", "helpfulness"])),
    "prm": ("prm", "gpt2", {}),
    "preference": ("preference", "gpt2", dict(label_smoothing=0.1, nll_coefficient=0.5)),
    "preference, kto": ("preference", "gpt2", dict(algorithm="kto", undesirable_weight=1.5)),
    "ppo": ("ppo", "gpt2", dict(missing_eos_penalty=0.5)),
    "ppo, shared trunk": ("ppo", "gpt2", dict(shared_trunk=True, kl_estimator="k3") | OF_SAO),
    "grpo": ("grpo", "gpt2", COOL | dict(kl_coefficient=0.1, entropy_coefficient=0.01, overlong_buffer=3)),
    "grpo, of answers": ("grpo", "llama", COOL | OF_ANSWERS | dict(advantage="rloo_std", aggregation="constant")),
    "grpo, of tokens": ("grpo", "gpt2", COOL | OF_TOKENS | dict(advantage="reinforce++", mask_truncated=True)),
    "grpo, score centering": ("grpo", "gpt2", COOL | CENTERED),
    "distill": ("distill", "llama", dict(on_policy_share=0.0, distill_temperature=0.7)),
    "distill, its own responses": ("distill", "gpt2", COOL | dict(on_policy_share=1.0, divergence="reverse")),
    "distill, a teacher with the response": ("distill", "gpt2", COOL | WITH_RESPONSE),
    "sdpo": ("sdpo", "gpt2", dict(temperature=0.5, group_size=2, skip_tokens=1, teacher_ema=0.0)),
    "distill, several teachers": ("distill", "llama", dict(on_policy_share=0.0, teacher_column="domain")),
    "ppo, text mixed in": ("ppo", "llama", dict(ptx_coefficient=0.5, normalize_reward=True, kl_target=1.0) | OF_BPCO),
}
BATCH = 8
FILLER = 7  # what padding holds: a word of the vocabulary, so that nothing may depend on the id of padding


@dataclasses.dataclass(frozen=True)
class Variation:
    """What may change in a step and must not matter.

    Attributes:
        order: the batch's rows, permuted.
        left, right: columns of padding added to every batch of tensors that the trainer makes.
        micro_batch_size: rows of one forward and backward pass.
        max_rows: of the longest kind in one pass, by its tokens; None to count rows alone.
        bucketed: rows of like length share a micro-batch, as they do by default.
    """

    order: tuple[int, ...] = tuple(range(BATCH))
    left: int = 0
    right: int = 0
    micro_batch_size: int = BATCH
    max_rows: int | None = None
    bucketed: bool = True


def make_trainer(name: str, families: dict[str, dict[str, str]], runtime, folder):
    """At a learning rate of 0, so that the same trainer can do the same step over and over.

    Args:
        families: by architecture, what `make_family` gives, and rows that name a teacher (`taught`).
    """
    algorithm, family, changes = TRAINERS[name]
    world = families[family]
    settings = settings_for(algorithm, world, output_dir=str(folder), batch_size=BATCH, **changes)
    settings |= dict(learning_rate=0.0, max_grad_norm=0.0, model=world["policy"], model_config=None)
    if algorithm in ("ppo", "grpo"):
        settings |= dict(ppo_epochs=1, minibatches=1)
    if algorithm == "ppo":
        settings |= dict(critic_learning_rate=0.0)
    if "teacher_column" in changes:
        settings |= dict(teacher=None, teachers={"a": families["gpt2"]["policy"], "b": world["teacher"]})
        settings |= dict(train_data=[world["taught"]], eval_data=[])
    if "ptx_coefficient" in changes:
        settings["ptx_data"] = [world["sft"]]
    config_class, trainer_class = trainer_classes(algorithm)
    trainer = trainer_class(configure(config_class, **settings), runtime)
    if algorithm in ("ppo", "grpo", "distill", "sdpo"):
        end_some_answers(trainer)
    if algorithm == "preference":  # away from the reference, where all rewards are 0
        nudge((trainer.reference.engine if trainer.reference else trainer.engines["model"]).module.parameters(), 0.2)
    return trainer


def with_teachers(rows: str, folder: Path) -> str:
    """A file of these rows, of which every third has another teacher."""
    lines = Path(rows).read_text().splitlines()
    taught = [json.loads(line) | {"domain": "b" if i % 3 else "a"} for i, line in enumerate(lines)]
    return write_rows(folder / "taught.jsonl", taught)


@torch.no_grad()
def end_some_answers(trainer):
    """Makes EOS likelier than a word that about half of the answers hold, so that these end there and others later or
    not at all. The reference stays as it was, so there is a KL."""
    prompts = [prompt_of(trainer.data, i, [i]) for i in range(BATCH)]
    samples = trainer.generation.sample(prompts, trainer.config.generation).samples
    answers = [[token for token, ours in zip(s.tokens, s.response_mask, strict=True) if ours] for s in samples]
    words = sorted({word for answer in answers for word in answer[3:]})
    word = min(words, key=lambda w: abs(sum(w in answer for answer in answers) - BATCH / 2))
    outputs = trainer.actor.module.transformer.get_output_embeddings().weight
    outputs[trainer.tokenizer.eos_token_id] = 1.1 * outputs[word]


def run_step(trainer, variation: Variation, step: int = 0) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics of the trainer's real step, and the gradients as the optimizer gets them, `engine.parameter`."""
    gradients: dict[str, torch.Tensor] = {}
    state = trainer.state()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(trainer.batching, "micro_batch_size", variation.micro_batch_size)
        if variation.max_rows:
            rows = variation.max_rows // getattr(trainer, "rows_per_sample", 1)
            patch.setattr(trainer.batching, "max_tokens", rows * trainer.config.longest_row)
        if variation.left:  # models are told that padding stands on the right otherwise
            _wrap(patch, "model_inputs", lambda f, *a, **k: f(*a, **k) | {"right_padded": False})
        _permute(trainer, variation, patch)
        _repad_and_split(trainer, variation, patch)
        for name, engine in trainer.engines.items():
            record_gradients(name, engine, gradients, patch)
        # as after some updates: ratios are not 1 and some tokens are clipped
        _wrap(patch, "learn", lambda f, *a: (stack.enter_context(moved(trainer)), f(*a))[1])
        metrics = trainer.step(step)
    trainer.load_state(state)
    how = ("seconds/", "padding_share")
    metrics = {name: value for name, value in metrics.items() if not name.startswith(how)}
    return metrics, gradients


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What an iteration of PPO or GRPO went through."""

    batch: RolloutBatch
    experience: Experience
    metrics: dict[str, float]


def iterate(
    trainer, k: int = 0, change: Callable[[RolloutBatch], RolloutBatch] | None = None, learns: bool = False
) -> Iteration:
    """The trainer's real iteration k.

    Args:
        change: makes another batch of what was sampled.
        learns: False to leave the models as they are.
    """
    seen: dict[str, Any] = {}
    rollouts = trainer.rollouts.next

    def changed(k):
        batch, metrics = rollouts(k)
        seen["batch"] = change(batch) if change else batch
        return seen["batch"], metrics

    def learn(function, experience, *arguments):
        seen["experience"] = experience
        return function(experience, *arguments) if learns else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.rollouts, "next", changed)
        _wrap(patch, "learn", learn)
        metrics = trainer.step(k)
    return Iteration(**seen, metrics=metrics)


def change_losses(engine, change: Callable):
    """Has the engine's updates use `change(loss, metrics)` of each micro-batch's part of a loss and its metrics."""
    update_of = engine.update

    @contextmanager
    def changed(rate):
        with update_of(rate) as update:
            add = update.add
            update.add = lambda parts, inputs, loss, count: add(parts, inputs, lambda *a: change(*loss(*a)), count)
            yield update

    engine.update = changed


def run_job(job: dict, runtime) -> list[dict[str, float]]:
    """The step of `job["name"]` in each of `job["variations"]`: the metrics; gradients go to numbered files."""
    trainer, metrics = make_trainer(job["name"], job["families"], runtime, job["folder"]), []
    for i, variation in enumerate(job["variations"]):
        found, gradients = run_step(trainer, Variation(**variation))
        metrics.append(found)
        if runtime.is_main:
            save_file(gradients, gradient_file(job["folder"], i))
    return metrics


def gradient_file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number}.safetensors"


@contextmanager
def moved(trainer) -> Iterator[None]:
    """The trained models a little way from where they were, and back at the end; alike on every rank."""
    parameters = [p for engine in trainer.engines.values() for p in engine.module.parameters()]
    before = [p.detach().clone() for p in parameters]
    nudge(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


@torch.no_grad()
def nudge(parameters: Iterable[torch.Tensor], size: float = 0.03):
    generator = torch.Generator().manual_seed(11)
    for p in parameters:
        p += size * torch.randn(p.shape, generator=generator)


def record_gradients(name: str, engine, gradients: dict, patch):
    step = engine.step

    def recording(rate: float, **options) -> float:
        for key, p in engine.module.named_parameters():
            if p.grad is not None:
                gradients[f"{name}.{key}"] = p.grad.detach().clone()
        return step(rate, **options)

    patch.setattr(engine, "step", recording)


def _wrap(patch, name: str, wrapper):
    """Puts `wrapper(function, *arguments)` in place of a function, wherever modules of coati.trainers hold it."""
    for module in [m for key, m in sys.modules.items() if key.startswith("coati.trainers.") and hasattr(m, name)]:
        patch.setattr(module, name, functools.partial(wrapper, getattr(module, name)))


def _permute(trainer, variation: Variation, patch):
    for name in ("order", "text_order", "demonstration_order"):
        if hasattr(trainer, name):
            batch = getattr(trainer, name).batch
            permuted = lambda k, batch=batch: [batch(k)[i] for i in variation.order]  # noqa: E731
            patch.setattr(getattr(trainer, name), "batch", permuted)


def _repad_and_split(trainer, variation: Variation, patch):
    """Wraps what makes batches of rows, and of samples, and what splits them."""
    for name in ("collate_sft", "collate_preference", "collate_unpaired", "collate_stepwise", "collate_scored"):
        _wrap(patch, name, lambda f, *a: padded(f(*a), variation))
    if not variation.bucketed:
        shard, size = trainer.batching.shard, variation.micro_batch_size
        patch.setattr(trainer.batching, "shard", lambda rows, _: shard(rows, dict.fromkeys(rows, 0)))
        in_order = lambda n: [list(range(n))[i : i + size] for i in range(0, n, size)]  # noqa: E731
        patch.setattr(trainer.batching, "split", lambda lengths, _group=1: in_order(len(lengths)))
    if hasattr(trainer, "teach"):
        teach = trainer.teach
        repad = lambda r: dataclasses.replace(  # noqa: E731
            r, student=padded(r.student, variation), teacher=padded(r.teacher, variation)
        )
        patch.setattr(trainer, "teach", lambda readings: teach([repad(reading) for reading in readings]))
    elif hasattr(trainer, "rollouts"):
        rollouts, updates = trainer.rollouts.next, getattr(trainer, "models", trainer)
        update = updates.update
        # a rollout's padding is on the right by contract
        right = dataclasses.replace(variation, left=0)
        repadded = lambda batch, metrics: (padded(batch, right), metrics)  # noqa: E731
        patch.setattr(trainer.rollouts, "next", lambda k: repadded(*rollouts(k)))
        patch.setattr(updates, "update", lambda micro, *a: update([padded(b, variation) for b in micro], *a))


def padded(batch, variation: Variation):
    """`batch`, a dataclass of tensors, with more columns: another token, False and NaN."""
    wider, sides = {}, (variation.left, variation.right)
    for field in dataclasses.fields(batch):
        x = getattr(batch, field.name)
        if isinstance(x, torch.Tensor) and x.shape == batch.input_ids.shape:
            fill = False if x.dtype == torch.bool else torch.nan if x.is_floating_point() else FILLER
            wider[field.name] = pad(x, sides, value=fill)
    return dataclasses.replace(batch, **wider)
