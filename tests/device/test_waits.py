"""How often the host waits for the device: on a GPU each wait drains the queue of launched kernels.

A step's waits are counted by place, and the limits here are what they are today. One that grows fails with the places.
"""

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from coati.models import Actor, RewardModel
from tests.device.jobs import make_job, sizes

pytestmark = pytest.mark.distributed
DECODING = 1  # waits of one token of all rows
# Waits of a step with one micro-batch (of PPO and GRPO: an iteration with one update, without decoding), of one
# micro-batch more, and of one update more.
BUDGETS = {
    "sft": (5, 1, 0),
    "reward": (3, 0, 0),
    "dpo": (7, 4, 0),
    "kto": (7, 4, 0),
    "ppo": (19, 2, 9),
    "ppo, shared trunk": (14, 3, 5),
    "grpo": (12, 1, 6),
    "grpo, dynamic": (13, 2, 6),  # its correction recomputes the log-probs of every micro-batch
    "grpo, shared prompts": (16, 4, 7),
}
LEARNS_FROM_RESPONSES = [run for run in BUDGETS if run.startswith(("ppo", "grpo"))]


def listed(waits: dict[str, int]) -> str:
    return "\n" + "\n".join(f"{count:6} {place}" for place, count in sorted(waits.items(), key=lambda x: -x[1]))


def more(larger: dict[str, int], smaller: dict[str, int]) -> dict[str, int]:
    """By place, how much more often the host waits."""
    return {place: n for place in larger if (n := larger[place] - smaller.get(place, 0)) > 0}


def test_a_token_of_all_rows_waits_once_whatever_layers_and_rows(strict_device):
    for found in strict_device("waits_of_decoding", sizes=[(2, 8), (4, 16)], samplings=["plain", "all", "greedy"]):
        assert sum(found["waits"].values()) <= DECODING * found["steps"], listed(found["waits"])


@pytest.fixture(scope="module")
def steps(strict_device, device_world, tmp_path_factory) -> dict[str, dict[str, int]]:
    """The waits of a step, by run and size: `small`, `large` with twice the layers and rows, `split` into two
    micro-batches, `again` with one update more."""
    folder, jobs = tmp_path_factory.mktemp("steps"), {}
    deep = device_world | deeper(device_world, folder)
    for run in BUDGETS:
        for size, world, changes in (
            ("small", device_world, {}),
            ("large", deep, dict(times=2)),
            ("split", device_world, dict(micro_batches=2)),
            ("again", device_world, dict(updates=2)),
        ):
            if size != "again" or run in LEARNS_FROM_RESPONSES:
                name = f"{run}, {size}"
                jobs[name] = make_job(name, run, world, folder, **sizes(run, **changes))
    return strict_device("waits_of_steps", jobs=jobs)


def deeper(world: dict[str, str], folder) -> dict[str, str]:
    """The world's models with four layers."""
    config = AutoConfig.from_pretrained(world["model_config"])
    config.num_hidden_layers = 4
    paths = {name: str(folder / name) for name in ("policy", "scorer")}
    for name, model_class in (("policy", Actor), ("scorer", RewardModel)):
        torch.manual_seed(2)
        model_class(config=config).save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(world["tokenizer"]).save_pretrained(paths[name])
    return paths | {"model_config": paths["policy"] + "/config.json"}


@pytest.mark.parametrize("run", BUDGETS)
def test_a_step_keeps_to_its_budget_of_waits(run, steps):
    small, (budget, *_) = steps[f"{run}, small"], BUDGETS[run]
    assert sum(small.values()) <= budget, listed(small)


@pytest.mark.parametrize("run", BUDGETS)
def test_a_micro_batch_keeps_to_its_budget_of_waits(run, steps):
    split, (_, budget, _) = more(steps[f"{run}, split"], steps[f"{run}, small"]), BUDGETS[run]
    assert sum(split.values()) <= budget, listed(split)


@pytest.mark.parametrize("run", LEARNS_FROM_RESPONSES)
def test_an_update_keeps_to_its_budget_of_waits(run, steps):
    update, (*_, budget) = more(steps[f"{run}, again"], steps[f"{run}, small"]), BUDGETS[run]
    assert sum(update.values()) <= budget, listed(update)


@pytest.mark.parametrize("run", BUDGETS)
def test_waits_do_not_grow_with_layers_and_rows(run, steps):
    grown = more(steps[f"{run}, large"], steps[f"{run}, small"])
    assert not grown, listed(grown)
