"""What a run says of its health, and how it lives through a step whose numbers are not finite."""

import math

import pytest
import torch

from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import settings_for, trainer_classes
from tests.distributed.world import run_jobs

SPOILED = 1  # the step, from 0, in which the planted mistake lies
LOSS_OF = {"sft": "loss", "ppo": "policy_share"}
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


def make(algorithm, world, runtime, output, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(config_class(**settings_for(algorithm, world, output_dir=str(output), **changes)), runtime)


@pytest.fixture(scope="module")
def spoiled(tiny_world, tmp_path_factory):
    """Runs of two processes, each with one spoiled step on one of them, by case."""
    folder, jobs = tmp_path_factory.mktemp("spoiled"), []
    for case in CASES:
        layout, algorithm, kind = case
        changes = LAYOUTS[layout] | dict(output_dir=str(folder / "-".join(case)))
        if algorithm == "ppo":  # sampled answers: with greedy ones the fresh policy's advantages may vanish
            changes |= dict(ppo_epochs=1, minibatches=1, temperature=1.0)
        spoil = dict(method=LOSS_OF[algorithm], step=SPOILED, kind=kind)
        settings = settings_for(algorithm, tiny_world, **changes)
        jobs.append(dict(name="-".join(case), algorithm=algorithm, settings=settings, spoil=spoil))
    results = run_jobs(jobs, folder / "runs", 2, "spoiled_worker.py")
    return {name: result | {"logged": read_metrics(folder / name)} for name, result in results.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(case, spoiled):
    """Weights and optimiser state of that model stay bitwise as they were; the steps around it are done."""
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
