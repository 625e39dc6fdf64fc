"""Tests on a real GPU. `tools/gpu_check.sh` runs them: it says by COATI_TEST_DEVICE which device they are for.

On `cpu` the same tests run at tiny sizes, so that they can't rot where there is no GPU.
"""

import json
import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("COATI_TEST_DEVICE")
FIGURES = os.environ.get("COATI_GPU_FIGURES")  # a file that figures are appended to, a JSON line each
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    missing = DEVICE is None or (DEVICE == "cuda" and not torch.cuda.is_available())
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(
                    pytest.mark.skip(reason="needs a GPU: run tools/gpu_check.sh on a machine that has one")
                )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE or "cpu")


@pytest.fixture
def figure(request):
    """Keeps a figure of this test for the table of the run."""

    def keep(name: str, value):
        line = json.dumps({"test": request.node.name, "name": name, "value": value})
        print(line)
        if FIGURES:
            with open(FIGURES, "a") as file:
                file.write(line + "\n")

    return keep


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, in float64 on the host; infinite for what is not a number."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    error = ((found - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
