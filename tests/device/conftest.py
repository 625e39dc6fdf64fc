"""The strict device as a fixture: see `strict.py`."""

import itertools
import json

import pytest

from tests.distributed import forks


@pytest.fixture(scope="session")
def strict_device(tmp_path_factory):
    """Calls a function of `tests/device/work.py` in processes whose device is strict, for the device changes torch.

    `strict_device(name, processes=1, fault=None, watchdog=None, **arguments)` gives its result on rank 0.
    """
    folder, numbers = tmp_path_factory.mktemp("strict"), itertools.count()

    def call(function: str, processes: int = 1, fault: str | None = None, watchdog: float | None = None, **arguments):
        from tests.device import work

        place = folder / f"{next(numbers)}-{function}"
        file = place / "result.json"
        ranks = forks.start(work.call, place, processes, function, arguments, str(file), fault, watchdog)
        try:
            assert forks.wait(ranks, 600) == [0] * processes, (place / "log.txt").read_text()[-6000:]
        finally:
            forks.end(ranks)
        return json.loads(file.read_text())

    return call


@pytest.fixture(scope="session")
def device_world(tiny_world, tmp_path_factory) -> dict[str, str]:
    """The tiny world with a reward model in the folder `scorer`."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from coati.models import RewardModel

    folder = str(tmp_path_factory.mktemp("scorer"))
    torch.manual_seed(1)
    RewardModel(config=AutoConfig.from_pretrained(tiny_world["model_config"])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(folder)
    return tiny_world | {"scorer": folder}
