"""How often the host waits for the device: on a GPU each wait drains the queue of launched kernels.

A step's waits are counted by place, and the limits here are what they are today. One that grows fails with the places.
"""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from coati.models import Actor, RewardModel
from tests.device.jobs import make_job

pytestmark = pytest.mark.distributed
DECODING = 1  # waits of one token of all rows
# Waits of a step with one micro-batch (of PPO and GRPO: an iteration with one update), and of one update more. Those of
# decoding are not among them.
BUDGETS = {
    "sft": (6, None),
    "reward": (4, None),
    "dpo": (8, None),
    "kto": (9, None),
    "ppo": (38, 11),
    "ppo, shared trunk": (22, 7),
    "grpo": (23, 8),
    "grpo, shared prompts": (28, 9),
}
LEARNS_FROM_ANSWERS = [run for run, (_, update) in BUDGETS.items() if update is not None]


def listed(waits: dict[str, int]) -> str:
    return "\n" + "\n".join(f"{count:6} {place}" for place, count in sorted(waits.items(), key=lambda x: -x[1]))


def more(larger: dict[str, int], smaller: dict[str, int]) -> dict[str, int]:
    """By place, how much more often the host waits."""
    return {place: n for place in larger if (n := larger[place] - smaller.get(place, 0)) > 0}


@pytest.mark.parametrize("sampling", ["plain", "all", "greedy"])
def test_a_token_of_all_rows_waits_once_whatever_layers_and_rows(sampling, strict_device):
    few = strict_device("waits_of_decoding", layers=2, rows=8, sampling=sampling)
    many = strict_device("waits_of_decoding", layers=4, rows=16, sampling=sampling)
    for found in (few, many):
        assert sum(found["waits"].values()) <= DECODING * found["steps"], listed(found["waits"])


@pytest.fixture(scope="module")
def steps(strict_device, device_world, tmp_path_factory) -> dict[str, dict[str, int]]:
    """The waits of a step, by run and size: `small`, `large` with twice the layers and rows, `again` with one update
    more."""
    folder, jobs = tmp_path_factory.mktemp("steps"), {}
    deep = device_world | deeper(device_world, folder)
    for run in BUDGETS:
        rows = 4 if run in LEARNS_FROM_ANSWERS else 8
        for size, world, n, updates in (
            ("small", device_world, rows, 1),
            ("large", deep, 2 * rows, 1),
            ("again", device_world, rows, 2),
        ):
            changes = dict(batch_size=n, micro_batch_size=2 * n, eval_data=[])
            changes |= dict(minibatches=1, ppo_epochs=updates) if run in LEARNS_FROM_ANSWERS else {}
            if size != "again" or run in LEARNS_FROM_ANSWERS:
                name = f"{run}, {size}"
                jobs[name] = make_job(name, run, world, folder, **changes)
    return strict_device("waits_of_steps", jobs=jobs)


def deeper(world: dict[str, str], folder) -> dict[str, str]:
    """The world's models with four layers."""
    config = AutoConfig.from_pretrained(world["model_config"])
    config.num_hidden_layers = 4
    paths = {name: str(folder / name) for name in ("policy", "judge")}
    for name, model_class in (("policy", Actor), ("judge", RewardModel)):
        torch.manual_seed(2)
        model_class(config=config).save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(world["tokenizer"]).save_pretrained(paths[name])
    return paths | {"model_config": paths["policy"] + "/config.json"}


@pytest.mark.parametrize("run", BUDGETS)
def test_a_step_keeps_to_its_budget_of_waits(run, steps):
    small, (budget, _) = steps[f"{run}, small"], BUDGETS[run]
    assert sum(small.values()) <= budget, listed(small)


@pytest.mark.parametrize("run", LEARNS_FROM_ANSWERS)
def test_an_update_keeps_to_its_budget_of_waits(run, steps):
    update, (_, budget) = more(steps[f"{run}, again"], steps[f"{run}, small"]), BUDGETS[run]
    assert sum(update.values()) <= budget, listed(update)


@pytest.mark.parametrize("run", BUDGETS)
def test_waits_do_not_grow_with_layers_and_rows(run, steps):
    grown = more(steps[f"{run}, large"], steps[f"{run}, small"])
    assert not grown, listed(grown)
