"""Starting a process of a run: under `colossalai run`, torchrun, srun, `coati run`, or plain `python`."""

import logging
import os
import random
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coati.errors import UserError
from coati.parallel.communication import Communicator
from coati.watch import watch_launcher

DEVICE_FILES = Path("/dev")
# Longer than rank 0 takes to tokenize a corpus or to write a large checkpoint; a dead process is noticed at once.
LONGEST_WAIT = timedelta(hours=6)


@dataclass
class Runtime:
    """This process's place in the run.

    Attributes:
        device: where models live.
        communicator: collective operations.
        communicators: those of `data_ranks`, by size.
        stop_requested: the signal that asked for a stop (SIGTERM or SIGINT); trainers look at it after each step.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    communicator: Communicator
    stop_requested: str | None = None
    communicators: dict[int, Communicator] = field(default_factory=dict)

    def data_ranks(self, model_parallel_size: int) -> Communicator:
        """The communicator over ranks that see different data, where so many neighbors hold one model together."""
        if model_parallel_size not in self.communicators:
            self.communicators[model_parallel_size] = self.communicator.data_parallel(model_parallel_size)
        return self.communicators[model_parallel_size]

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
    """Joins the process group that the launcher prepared, or makes one of a single process. From the main thread only.

    Every rank gets the same random state, so that models are created alike; trainers call `seed_everything` with the
    rank afterwards.

    Raises:
        UserError: a launcher's variables are set only in part.
    """
    watch_launcher()
    quiet_colossalai()
    import colossalai

    from coati.parallel import accelerator

    rank, world_size, local_rank = _rank_from_environment()
    _set_cuda_variables()
    accelerator.install()
    device = _select_device(local_rank)
    _join_process_group(rank, world_size, device)
    seed_everything(seed)
    torch._dynamo.config.optimize_ddp = world_size > 1
    colossalai.logging.get_dist_logger()  # sets its level when it is first asked for
    logging.getLogger("colossalai").setLevel(logging.WARNING)
    # they look for their caller in the sources of the whole stack, printed or not: 60 ms in each backward of Gemini
    colossalai.logging.DistributedLogger.debug = colossalai.logging.DistributedLogger.info = _say_nothing
    runtime = Runtime(rank, world_size, local_rank, device, Communicator(rank, world_size, device))
    _listen_for_stop(runtime)
    _quiet_other_ranks(runtime)
    return runtime


def _say_nothing(*arguments, **more):
    pass


def _set_cuda_variables():
    """What cuBLAS and torch's allocator read once. What the user has set stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `deterministic` needs it
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, which wins
        # batches of every length would leave holes that no later batch fits into
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _select_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU where there is none.

    Raises:
        UserError: more processes than GPUs on this machine; a GPU that torch can't use.
    """
    if not torch.cuda.is_available():
        if reason := why_not_the_gpu():
            raise UserError(
                f"this machine has a GPU that torch {torch.__version__} can't use ({reason}): update the driver, or "
                "install a torch for it, or train on the CPU with --device cpu"
            )
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start "
            "as many processes as GPUs (--nproc_per_node), or train on CPUs (--device cpu)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def why_not_the_gpu() -> str | None:
    """Torch's reason where it is built for NVIDIA GPUs, the machine has a visible one, and torch finds none: a run on
    the CPU would be a surprise."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if torch.version.cuda is None or hidden or not list(DEVICE_FILES.glob("nvidia[0-9]*")):
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _join_process_group(rank: int, world_size: int, device: torch.device):
    """The group that the launcher prepared. Tensors on a GPU travel by NCCL, those on the host by gloo: long
    waits (for rank 0, which tokenizes or writes) use gloo, since NCCL's watchdog ends a process that waits."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=LONGEST_WAIT,
        device_id=device if on_gpu else None,
    )


def shutdown():
    """Leaves the process group; without it torch warns at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int):
    """Python's, numpy's and torch's generators (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def use_deterministic_kernels(wanted: bool):
    """Whether operations on a GPU use deterministic kernels; those without one raise a RuntimeError."""
    torch.use_deterministic_algorithms(wanted)


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
    """Hides exactly the warnings and log lines that importing colossalai 0.5.0 causes and nobody can act on."""
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
    # bitsandbytes, which colossalai imports, looks for a 4-bit kernel on CPUs with AVX-512; nothing of ours needs one
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_a_kernel)


def _is_not_about_a_kernel(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in str(record.msg)


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank: from the environment, else from srun; alone if nothing started several of us."""
    present = [name for name in RANK_VARIABLES if name in os.environ]
    if "RANK" in present and len(present) < len(RANK_VARIABLES):
        missing = ", ".join(name for name in RANK_VARIABLES if name not in present)
        raise UserError(f"RANK is set but {missing} is not: start with `colossalai run` or torchrun, or unset RANK")
    if "RANK" not in present:
        in_step = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        os.environ.update(_rank_in_slurm_step() if in_step else rank_alone())
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def rank_alone(local_rank: str = "0") -> dict[str, str]:
    """The variables of a process that is in no group with others."""
    return dict(zip(RANK_VARIABLES, ["0", "1", local_rank, "127.0.0.1", "0"], strict=True))  # 0: any free port


def local_rank_in_slurm() -> str:
    """The number of a task's GPU among those it sees: srun may have given it one of its own, which is number 0."""
    return "0" if torch.cuda.device_count() == 1 else os.environ.get("SLURM_LOCALID", "0")


def _rank_in_slurm_step() -> dict[str, str]:
    """A task of `srun python ...`. MASTER_ADDR and MASTER_PORT stay as they are if the user has set them."""
    slurm = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "STEP_NUM_TASKS", "STEP_NODELIST")}
    local_rank = local_rank_in_slurm()
    # below the ports that Linux hands out; steps of a job, and jobs on a node, get different ones
    free = 10000 + (int(os.environ["SLURM_JOB_ID"]) * 16 + int(os.environ["SLURM_STEP_ID"])) % 20000
    address = os.environ.get("MASTER_ADDR", _first_host(slurm["STEP_NODELIST"]))
    port = os.environ.get("MASTER_PORT", str(free))
    return dict(zip(RANK_VARIABLES, [slurm["PROCID"], slurm["STEP_NUM_TASKS"], local_rank, address, port], strict=True))


def _first_host(hosts: str) -> str:
    """The first name of SLURM's host list: "n[01-03,7]-ib,m1" -> "n01-ib"."""
    first = re.match(r"(\[[^]]*\]|[^,[])*", hosts)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else hosts


def _quiet_other_ranks(runtime: Runtime):
    """One progress bar for a checkpoint that is read, not one per rank, and none where nobody watches."""
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
