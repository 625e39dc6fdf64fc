"""Reward models of steps and of objectives on two processes, under every layout, against one."""

import pytest

from tests.conftest import settings_for
from tests.distributed.forks import run_jobs
from tests.distributed.world import LAYOUTS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TWO = ("zero2", "zero2-offload", "tp2", "pp2", "sp2", "gemini, bf16")
BF16 = dict(plugin="zero2", precision="bf16")  # which gemini is compared with


def job(name: str, algorithm: str, world, folder, **changes) -> dict:
    settings = settings_for(
        algorithm, world, output_dir=str(folder / name), learning_rate=1e-3, save_every=0, **changes
    )
    return {"name": name, "algorithm": algorithm, "settings": settings}


def curve(result: dict) -> list[float]:
    return [step[name] for step in result["steps"] for name in ("loss", "accuracy", "grad_norm") if name in step]


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [("prm", {}), ("reward", dict(objectives=["verbosity", "helpfulness"]))],
    ids=["steps", "objectives"],
)
def test_every_layout_gives_the_curve_of_one_process(algorithm, changes, tiny_world, tmp_path):
    """PITFALL 9: a step's loss is divided by the labeled steps, or the given scores, of all ranks."""
    place = (algorithm, tiny_world, tmp_path)
    one = run_jobs([job("one", *place, **changes)], tmp_path / "alone", 1)["one"]
    jobs = [job(layout, *place, **changes, **LAYOUTS[layout]) for layout in TWO]
    found = run_jobs([*jobs, job("bf16", *place, **changes, **BF16)], tmp_path / "two", 2)
    for layout in TWO[:-1]:
        assert curve(found[layout]) == pytest.approx(curve(one), rel=1e-4, abs=1e-5), layout
    losses = [[step["loss"] for step in found[name]["steps"] if "loss" in step] for name in ("gemini, bf16", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
