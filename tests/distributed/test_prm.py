"""Process reward models on two processes, under every layout, against one; and as a reward there."""

import pytest

from tests.conftest import settings_for
from tests.distributed.forks import run_jobs
from tests.distributed.world import LAYOUTS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TWO = ("zero2", "zero2-offload", "tp2", "pp2", "sp2", "gemini, bf16")
BF16 = dict(plugin="zero2", precision="bf16")  # which gemini is compared with


def job(name: str, world, folder, **changes) -> dict:
    settings = settings_for("prm", world, output_dir=str(folder / name), learning_rate=1e-3, save_every=0, **changes)
    return {"name": name, "algorithm": "prm", "settings": settings}


def curve(result: dict) -> list[float]:
    return [step[name] for step in result["steps"] for name in ("loss", "accuracy", "grad_norm") if name in step]


def test_every_layout_gives_the_curve_of_one_process(tiny_world, tmp_path):
    """PITFALL 9: a step's loss is divided by the labeled steps of all ranks."""
    one = run_jobs([job("one", tiny_world, tmp_path)], tmp_path / "alone", 1)["one"]
    jobs = [job(layout, tiny_world, tmp_path, **LAYOUTS[layout]) for layout in TWO]
    found = run_jobs([*jobs, job("bf16", tiny_world, tmp_path, **BF16)], tmp_path / "two", 2)
    for layout in TWO[:-1]:
        assert curve(found[layout]) == pytest.approx(curve(one), rel=1e-4, abs=1e-5), layout
    losses = [[step["loss"] for step in found[name]["steps"] if "loss" in step] for name in ("gemini, bf16", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
