"""What a run says of its health, and how it lives through a step whose numbers are not finite."""

import dataclasses
import itertools
import math

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import settings_for, trainer_classes
from tests.distributed import spoiled_worker
from tests.distributed.forks import run_jobs
from tests.trainers.steps import change_losses, iterate

SPOILED = 1  # the step, from 0, in which the planted mistake lies
MODEL_OF = {"sft": "model", "ppo": "actor"}
# Under Gemini gradients lie in memory of their own or, with one micro-batch a step (4 rows), in that of the weights.
LAYOUTS = {
    "ddp": dict(plugin="ddp"),
    "zero1": dict(plugin="zero1"),
    "zero2": dict(plugin="zero2"),
    "gemini": dict(plugin="gemini", precision="bf16", learning_rate=1e-3),
    "gemini at once": dict(plugin="gemini", precision="bf16", learning_rate=1e-3, micro_batch_size=4),
    "tp2": dict(tensor_parallel=2),
    "pp2": dict(pipeline_parallel=2),
    "pp2 x zero1": dict(pipeline_parallel=2, plugin="zero1"),
    "tp2, bf16": dict(tensor_parallel=2, precision="bf16", learning_rate=1e-3),
}
CASES = [(layout, "sft", kind) for layout in LAYOUTS for kind in ("loss", "gradient")]
CASES += [("ddp", "ppo", "loss"), ("zero2", "ppo", "gradient")]


def make(algorithm, world, runtime, output, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


@pytest.fixture(scope="module")
def spoiled(tiny_world, tmp_path_factory):
    """Runs of two processes, each with one spoiled step on one of them, by case."""
    folder, jobs = tmp_path_factory.mktemp("spoiled"), []
    for case in CASES:
        layout, algorithm, kind = case
        changes = LAYOUTS[layout] | dict(output_dir=str(folder / "-".join(case)))
        if algorithm == "ppo":  # sampled answers: with greedy ones the fresh policy's advantages may vanish
            changes |= dict(ppo_epochs=1, minibatches=1, temperature=1.0)
        spoil = dict(model=MODEL_OF[algorithm], step=SPOILED, kind=kind)
        settings = settings_for(algorithm, tiny_world, **changes)
        jobs.append(dict(name="-".join(case), algorithm=algorithm, settings=settings, spoil=spoil))
    results = run_jobs(jobs, folder / "runs", 2, spoiled_worker.work)
    return {name: result | {"logged": read_metrics(folder / name)} for name, result in results.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(case, spoiled):
    """Weights and optimizer state of that model stay bitwise as they were; the steps around it are done."""
    layout, algorithm, kind = case
    result, model = spoiled["-".join(case)], MODEL_OF[algorithm]
    assert [model in names for names in result["moved"]] == [step != SPOILED for step in range(4)]
    assert all(result["alike"])
    steps, name = result["steps"], "loss" if algorithm == "sft" else "policy_loss"
    if "tp2" not in layout:  # there rank 0 has computed the same loss itself, without the mistake
        assert [math.isfinite(step[name]) for step in steps] == [s != SPOILED or kind == "gradient" for s in range(4)]
    assert [row["skipped_steps"] for row in result["logged"] if "skipped_steps" in row] == [0, 1, 1, 1]
    assert all(math.isfinite(number) for numbers in result["weights"].values() for number in numbers)
    if algorithm == "sft":
        assert steps[-1]["loss"] < steps[0]["loss"]
    else:
        assert all("critic" in names for names in result["moved"])  # its loss was finite


def spoil(engine, calls: set[int]):
    """Makes these of the engine's losses, counted from 0, NaN."""
    count = itertools.count()

    def spoiled(share, metrics):
        factor = math.nan if next(count) in calls else 1.0
        return share * factor, {name: value * factor for name, value in metrics.items()}

    change_losses(engine, spoiled)


def test_a_run_stops_after_so_many_skipped_steps_in_a_row(tiny_world, runtime, tmp_path):
    """A good step between them starts the count anew; the message has the step and the newest checkpoint."""
    changes = dict(steps=9, save_every=2, micro_batch_size=8, max_skipped_steps=2, eval_data=[])
    trainer = make("sft", tiny_world, runtime, tmp_path, **changes)
    spoil(trainer.model, {1, 3, 5, 6})
    with pytest.raises(UserError, match=r"step 7: loss is nan, skipped 2 steps in a row .*step-00000006") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert [row["skipped_steps"] for row in read_metrics(tmp_path)] == [0, 1, 1, 2, 2, 3]


def test_the_count_of_skipped_steps_goes_on_after_a_resume(tiny_world, runtime, tmp_path):
    trainer = make("sft", tiny_world, runtime, tmp_path, steps=2, save_every=2, micro_batch_size=8)
    spoil(trainer.model, {0})
    trainer.train()
    resumed = make("sft", tiny_world, runtime, tmp_path, steps=3, micro_batch_size=8, resume="auto")
    resumed.train()
    assert read_metrics(tmp_path)[-1]["skipped_steps"] == resumed.skipped_steps == 1


def test_models_are_counted_apart_and_a_skipped_update_leaves_the_metrics_of_the_others(tiny_world, runtime, tmp_path):
    """The critic's good steps don't hide that each of the policy's is skipped."""
    changes = dict(temperature=1.0, ppo_epochs=2, minibatches=2, micro_batch_size=8, max_skipped_steps=4)
    trainer = make("ppo", tiny_world, runtime, tmp_path / "once", **changes)
    spoil(trainer.actor, {1})
    metrics = trainer.step(0)
    assert trainer.skipped_steps == 1 and all(map(math.isfinite, metrics.values()))
    trainer = make("ppo", tiny_world, runtime, tmp_path / "always", **changes)
    spoil(trainer.actor, {0, 1, 2, 3})
    with pytest.raises(UserError, match="policy_loss is nan, skipped 4 steps in a row"):
        trainer.step(0)


def test_a_kl_that_is_not_finite_does_not_spoil_its_coefficient(tiny_world, runtime, tmp_path):
    changes = dict(temperature=1.0, kl_target=0.5, kl_horizon=50, micro_batch_size=8, max_skipped_steps=9)
    trainer = make("ppo", tiny_world, runtime, tmp_path, **changes)
    trainer.reference.engine.module.model.lm_head.weight.data.fill_(math.nan)
    metrics = trainer.step(0)
    assert math.isnan(metrics["kl"]) and trainer.kl_coefficient == trainer.config.algorithm.kl_coefficient
    assert trainer.skipped_steps > 0


def test_both_estimates_of_the_kl_and_how_answers_end_are_logged(tiny_world, runtime, tmp_path):
    trainer = make("ppo", tiny_world, runtime, tmp_path, temperature=1.0, kl_estimator="k2", learning_rate=0.0)
    head = trainer.reference.engine.module.model.lm_head.weight.data
    head.mul_(0.5)  # now the reference differs from the policy
    found = iterate(trainer)
    batch, experience, metrics = found.batch, found.experience, found.metrics
    mask = batch.response_mask
    x = (experience.log_probs - experience.reference_log_probs)[mask].double()
    expected = {"kl/k1": x.sum(), "kl": (x**2).sum() / 2, "kl/k3": (torch.exp(-x) - 1 + x).sum()}
    for name, total in expected.items():
        assert metrics[name] == pytest.approx(total.item() / len(batch), rel=1e-5), name
    ends = [ids[m][-1].item() == trainer.tokenizer.eos_token_id for ids, m in zip(batch.input_ids, mask, strict=True)]
    assert metrics["finished"] == pytest.approx(sum(ends) / len(ends))
    assert metrics["truncated"] == pytest.approx(1 - metrics["finished"])


def test_a_mismatch_of_sampling_and_training_is_explained(tiny_world, runtime, tmp_path):
    """Another temperature at sampling than in training, planted; the limit is on by default."""
    trainer = make("ppo", tiny_world, runtime, tmp_path, temperature=1.0)
    trainer.actor.module.model.lm_head.weight.data.mul_(20)  # a policy with opinions
    assert abs(iterate(trainer).metrics["rollout_kl"]) < 1e-6
    with pytest.raises(UserError, match=r"mismatch: .* nats per token .*weights.*temperature.*precision"):
        iterate(trainer, change=lambda batch: dataclasses.replace(batch, temperature=3.0))
