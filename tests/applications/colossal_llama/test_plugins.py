"""A stage under the plugins: the single process's losses and weights, and exact resume."""

import pytest

from tests.applications.colossal_llama.world import packed_world, settings
from tests.distributed.forks import run_jobs

pytestmark = pytest.mark.distributed
FROZEN = dict(freeze="all-but-embeddings")
BF16 = dict(precision="bf16", learning_rate=1e-3)  # a small rate, or Adam makes much of rounding
CASES = {
    "zero2": dict(plugin="zero2"),
    "zero2-frozen": dict(plugin="zero2") | FROZEN,
    "tensor": dict(tensor_parallel=2),
    "pipeline": dict(pipeline_parallel=2),
    "zero2-bf16": dict(plugin="zero2") | BF16,
    "gemini-bf16": dict(plugin="gemini") | BF16,
}


@pytest.fixture(scope="module")
def runs(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    packed = packed_world(folder / "data")

    def job(name: str, **changes) -> dict:
        chosen = settings(tiny_world, packed, output_dir=str(folder / name), z_loss=1e-3, **changes)
        return {"name": name, "algorithm": "pretrain", "settings": chosen}

    alone = run_jobs([job("alone"), job("alone-frozen", **FROZEN)], folder / "one", 1)
    checkpoint = str(folder / "zero2" / "checkpoints" / "step-00000002")
    jobs = [job(name, **changes) for name, changes in CASES.items()]
    return alone | run_jobs([*jobs, job("resumed", resume=checkpoint, **CASES["zero2"])], folder / "two", 2)


def curve(run: dict) -> list[float]:
    return [step[name] for step in run["steps"] for name in ("loss", "z_loss", "seen/en", "seen/zh")]


@pytest.mark.parametrize("name", ["zero2", "zero2-frozen", "tensor", "pipeline"])
def test_a_plugin_gives_the_single_process_run(name, runs):
    expected, found = runs["alone-frozen" if "frozen" in name else "alone"], runs[name]
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4)
    for weight, numbers in expected["weights"].items():
        assert found["weights"][weight] == pytest.approx(numbers, rel=1e-4, abs=1e-4), weight


def test_gemini_gives_the_curve_of_zero2_in_bf16(runs):
    assert curve(runs["gemini-bf16"]) == pytest.approx(curve(runs["zero2-bf16"]), rel=1e-2)


def test_a_resumed_stage_is_bitwise_the_uninterrupted_one(runs):
    assert curve(runs["resumed"]) == curve(runs["zero2"])[8:]
    assert runs["resumed"]["weights"] == runs["zero2"]["weights"]
