"""Every algorithm on a device that is as strict as a GPU: nothing is on the wrong device, nothing is read before it was
waited for, and losses are the CPU's.

Gemini can't run there: Colossal-AI asserts that its tensors are `torch.Tensor` itself.
"""

import pytest

from tests.device.jobs import RUNS, make_job

pytestmark = pytest.mark.distributed
# almost every run once here or on two ranks, each plugin several times; the rest of the table is slow
QUICK = {
    "sft, lora": "zero2",
    "sft, checkpointing": "zero1",
    "sft, bf16": "ddp",
    "reward": "zero2-offload",
    "dpo": "ddp",
    "ppo, shared trunk": "zero1",
    "grpo, shared prompts": "ddp",
    "grpo, remax": "zero2",
}
PLUGINS = ("ddp", "zero1", "zero2", "zero2-offload")
SLOW = [(run, plugin) for run in RUNS for plugin in PLUGINS if QUICK.get(run) != plugin]


def compare(found: dict[str, dict], run: str):
    """The run on the strict device gave what the run on the CPU gave: the same kernels add up in the same order, but
    attention has another one, which in bf16 rounds in other places."""
    for kind in ("cpu", "strict"):
        assert "error" not in found[kind], found[kind]["error"][-3000:]
    assert found["strict"]["devices"] == ["npu"]
    [expected], [step] = found["cpu"]["steps"], found["strict"]["steps"]
    assert step.keys() == expected.keys()
    for name, value in expected.items():
        precision = 1e-3 if "bf16" in run else 1e-5 if "norm" in name else 1e-6
        assert step[name] == pytest.approx(value, rel=precision, abs=precision, nan_ok=True), name


@pytest.fixture(scope="module")
def quick(strict_device, device_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    jobs = {run: make_job(run, run, device_world, folder, plugin=plugin) for run, plugin in QUICK.items()}
    return strict_device("train", jobs=jobs)


@pytest.mark.parametrize("run", QUICK)
def test_a_run_on_a_strict_device_gives_what_the_cpu_gives(run, quick):
    compare(quick[run], run)


@pytest.fixture(scope="module")
def slow(strict_device, device_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    jobs = {f"{run}, {p}": make_job(f"{run}, {p}", run, device_world, folder, plugin=p) for run, p in SLOW}
    return strict_device("train", jobs=jobs)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "plugin"), SLOW)
def test_a_run_under_every_plugin_on_a_strict_device_gives_what_the_cpu_gives(run, plugin, slow):
    compare(slow[f"{run}, {plugin}"], run)


# one model's work on two ranks
LAYOUTS = {name: dict([(f"{name}_parallel", 2)]) for name in ("tensor", "pipeline", "sequence")}
ON_TWO = {name: dict(plugin=name) for name in ("ddp", "zero1", "zero2")} | LAYOUTS
SPLIT = ("sft", "reward", "dpo, prompts apart", "kto", "ppo", "grpo")  # shared prompts need whole models
TWO_QUICK = [("kto", "zero2"), ("ppo", "ddp"), ("grpo", "tensor"), ("reward", "pipeline"), ("sft", "sequence")]
TWO_SLOW = [(run, name) for run in RUNS for name in ("ddp", "zero2") if (run, name) not in TWO_QUICK]
TWO_SLOW += [(run, name) for run in SPLIT for name in LAYOUTS]
TWO_SLOW = [case for case in TWO_SLOW if case not in TWO_QUICK]


def run_on_two(cases: list[tuple[str, str]], strict_device, world, folder) -> dict:
    jobs = {f"{run}, {on}": make_job(f"{run}, {on}", run, world, folder, **ON_TWO[on]) for run, on in cases}
    return strict_device("train", processes=2, jobs=jobs)


@pytest.fixture(scope="module")
def two_ranks(strict_device, device_world, tmp_path_factory):
    return run_on_two(TWO_QUICK, strict_device, device_world, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("run", "on"), TWO_QUICK)
def test_two_ranks_on_strict_devices_give_what_two_on_the_cpu_give(run, on, two_ranks):
    compare(two_ranks[f"{run}, {on}"], run)


@pytest.fixture(scope="module")
def two_ranks_slow(strict_device, device_world, tmp_path_factory):
    return run_on_two(TWO_SLOW, strict_device, device_world, tmp_path_factory.mktemp("two-slow"))


@pytest.mark.slow
@pytest.mark.parametrize(("run", "on"), TWO_SLOW)
def test_so_do_two_ranks_of_any_run(run, on, two_ranks_slow):
    compare(two_ranks_slow[f"{run}, {on}"], run)
