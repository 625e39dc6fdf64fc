"""Faults that only a GPU shows are caught by the strict device: each is planted, and must be."""

import pytest

from tests.device.jobs import make_job
from tests.device.test_waits import DECODING

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("sampling", ["plain"])
@pytest.mark.parametrize("fault", ["wait_in_each_layer", "wait_for_each_row"])
def test_waits_that_grow_with_layers_or_rows_are_over_the_budget(fault, sampling, strict_device):
    few = strict_device("waits_of_decoding", fault=fault, layers=2, rows=8, sampling=sampling)
    many = strict_device("waits_of_decoding", fault=fault, layers=4, rows=16, sampling=sampling)
    a_step = [sum(found["waits"].values()) / found["steps"] for found in (few, many)]
    assert DECODING < a_step[0] < a_step[1]
    assert any("tests/device/faults.py" in place for place in few["waits"])  # named where it was planted


@pytest.mark.parametrize(
    ("fault", "run", "plugin", "error", "place"),
    [
        ("mask_on_the_cpu", "grpo", "ddp", "MixedDevices", "coati/"),
        ("positions_on_the_cpu", "sft", "zero2", "MixedDevices", "tests/device/faults.py:"),
        ("gradients_read_too_early", "sft", "zero1", "MissingWait", "coati/parallel/engine.py:"),
        ("gradients_read_too_early", "reward", "zero2", "MissingWait", "coati/parallel/engine.py:"),
    ],
)
def test_a_planted_fault_ends_a_run_and_is_named(
    fault, run, plugin, error, place, strict_device, device_world, tmp_path
):
    job = make_job("run", run, device_world, tmp_path, plugin=plugin, eval_data=[])
    message = strict_device("error_of", fault=fault, **job).strip().splitlines()[-1]
    assert error in message
    assert place in message


def test_copies_that_are_read_before_they_arrived_are_nonsense(strict_device):
    arguments = dict(layers=2, rows=2, sampling="plain")
    fine = strict_device("waits_of_decoding", **arguments)["tokens"]
    early = strict_device("waits_of_decoding", fault="tokens_read_too_early", **arguments)["tokens"]
    assert all(0 <= token < 64 for row in fine for token in row)
    assert not any(0 <= token < 64 for row in early for token in row)
