"""Faults that only a GPU shows are caught by the strict device: each is planted, and must be."""

import pytest

from tests.device.faults import LONG
from tests.device.jobs import make_job, sizes
from tests.device.test_waits import BUDGETS, DECODING

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("fault", ["wait_in_each_layer", "wait_for_each_row"])
def test_waits_that_grow_with_layers_or_rows_are_over_the_budget(fault, strict_device):
    few, many = strict_device("waits_of_decoding", fault=fault, sizes=[(2, 8), (4, 16)], samplings=["plain"])
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


@pytest.mark.slow
def test_pipeline_stages_that_reduce_on_another_stream_are_caught(strict_device, device_world, tmp_path):
    fine, faulty = (
        make_job(name, "sft", device_world, tmp_path, plugin="zero1", pipeline_parallel=2, eval_data=[])
        for name in ("fine", "faulty")
    )
    assert strict_device("error_of", processes=4, **fine) == ""
    assert "MissingWait" in strict_device("error_of", processes=4, fault="pipeline_overlaps", **faulty)


@pytest.mark.slow
def test_ranks_wait_for_what_rank_0_prepares_and_writes_without_the_devices_watchdog(
    strict_device, device_world, tmp_path
):
    """Which would end the run after ten minutes; here it is planted to do so earlier."""
    world, impatient = device_world | {"cache": str(tmp_path / "cache")}, dict(processes=2, watchdog=LONG / 2)
    waits, works = (make_job(name, "sft", world, tmp_path, save_every=1) for name in ("waits", "works"))
    assert strict_device("error_of", fault="rank_0_prepares_and_writes_slowly", **impatient, **waits) == ""
    assert "imed out" in strict_device("error_of_rank_1", fault="rank_0_steps_slowly", **impatient, **works)


@pytest.mark.parametrize("run", ["sft", "grpo"])
def test_batches_that_are_not_pinned_are_over_the_budget(run, strict_device, device_world, tmp_path):
    jobs = {"run": make_job("run", run, device_world, tmp_path, **sizes(run))}
    waits = strict_device("waits_of_steps", fault="pageable_copies", jobs=jobs)["run"]
    assert sum(waits.values()) > BUDGETS[run][0]
    assert any(place.startswith("copy from pageable memory: coati/transfer.py") for place in waits)


def test_copies_that_are_read_before_they_arrived_are_nonsense(strict_device):
    arguments = dict(sizes=[(2, 2)], samplings=["plain"])
    [fine] = strict_device("waits_of_decoding", **arguments)
    [early] = strict_device("waits_of_decoding", fault="tokens_read_too_early", **arguments)
    assert all(0 <= token < 64 for row in fine["tokens"] for token in row)
    assert not any(0 <= token < 64 for row in early["tokens"] for token in row)
