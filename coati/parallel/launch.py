"""Starting a process of a run: under `colossalai run`, torchrun, or plain `python`."""

import logging
import os
import random
import signal
import socket
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from coati.errors import UserError
from coati.parallel.communication import Communicator


@dataclass
class Runtime:
    """This process's place in the run.

    Attributes:
        device: where models live.
        communicator: collective operations.
        notes: lines worth showing once at the start.
        stop_requested: the signal that asked for a stop (SIGTERM or SIGINT); trainers look at it after each step.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    communicator: Communicator
    notes: list[str] = field(default_factory=list)
    stop_requested: str | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str):
        """One line on rank 0."""
        if self.is_main:
            print(line, flush=True)

    def first_to_fail(self) -> bool:
        """True for one rank only: the others' errors are usually echoes of a peer that went away."""
        try:
            return torch.distributed.distributed_c10d._get_default_store().add("coati/failed", 1) == 1
        except Exception:  # the store went with its host, which has failed before us
            return self.world_size == 1

    @contextmanager
    def main_first(self):
        """Rank 0 runs the block first (it fills a cache), the others after it."""
        if not self.is_main:
            self.communicator.barrier()
        yield
        if self.is_main:
            self.communicator.barrier()


def launch(seed: int = 42) -> Runtime:
    """Joins the process group that the launcher prepared, or makes one of a single process.

    Every rank gets the same random state, so that models are created alike; trainers call `seed_everything` with the
    rank afterwards.

    Raises:
        UserError: a launcher's variables are set only in part.
    """
    quiet_colossalai()
    import colossalai

    from coati.parallel import accelerator

    rank, world_size, local_rank = _place()
    notes = accelerator.install()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    colossalai.launch(rank, world_size, host, port, local_rank=local_rank, seed=seed, verbose=False)
    colossalai.logging.get_dist_logger()  # sets its level when it is first asked for
    logging.getLogger("colossalai").setLevel(logging.WARNING)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    runtime = Runtime(rank, world_size, local_rank, device, Communicator(rank, world_size, device), notes)
    _listen_for_stop(runtime)
    _quiet_other_ranks(runtime)
    return runtime


def shutdown():
    """Leaves the process group; without it torch warns at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int):
    """Python's, numpy's and torch's generators (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """All generators of this process as tensors, so that they are stored without pickle."""
    python = random.getstate()
    numpy: Any = np.random.get_state()
    state = {
        "python": torch.tensor([python[0], *python[1]], dtype=torch.int64),
        "numpy": torch.cat([torch.from_numpy(numpy[1].astype(np.int64)), torch.tensor(numpy[2:4])]),
        # Gaussians come in pairs; python and numpy keep the second one for the next call
        "gaussian": torch.tensor([python[2] is not None, python[2] or 0.0, numpy[4]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]):
    """The inverse of `random_state`."""
    has_kept, kept_by_python, kept_by_numpy = state["gaussian"].tolist()
    version, *python = state["python"].tolist()
    random.setstate((version, tuple(python), kept_by_python if has_kept else None))
    *keys, position, has_gaussian = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gaussian, kept_by_numpy))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def quiet_colossalai():
    """Hides exactly the warnings and log lines that colossalai 0.5.0 always causes and nobody can act on."""
    for pattern in (
        ".*tensornvme.*",
        ".*apex.*",
        ".*kernels.*",
        ".*torch.cuda.amp.*",
        ".*pynvml.*",
        "TypedStorage is deprecated.*",
        ".*all_gather_into_tensor.* is deprecated.*",
        ".*reduce_scatter_tensor.* is deprecated.*",
        ".*broadcast_buffers.* is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)


def _place() -> tuple[int, int, int]:
    """Rank, world size and local rank from the environment; alone if no launcher set any of them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in os.environ]
    if "RANK" not in given:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise UserError(f"RANK is set but {missing} is not: start with `colossalai run` or torchrun, or unset RANK")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _quiet_other_ranks(runtime: Runtime):
    """One progress bar for a checkpoint that is read, not one a rank, and none where nobody watches."""
    from transformers.utils import logging as transformers_logging

    if not (runtime.is_main and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
    if not runtime.is_main:
        transformers_logging.set_verbosity_error()


def _listen_for_stop(runtime: Runtime):
    def request_stop(number, frame):
        runtime.stop_requested = signal.Signals(number).name

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
