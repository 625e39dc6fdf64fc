"""What runs on the strict device, in processes of their own: each function is called there by its name.

Arguments and results are JSON.
"""

import json
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
from colossalai.pipeline import p2p

from coati.config import configure
from coati.parallel import accelerator, launch
from coati.parallel.runtime import Runtime, shutdown
from tests.conftest import trainer_classes
from tests.device import faults, strict
from tests.device.strict import device

CHECK_DEVICE, BATCH_ISEND_IRECV = p2p._check_device, p2p.dist.batch_isend_irecv
WHO = {p2p.dist.isend: "dst", p2p.dist.irecv: "src"}


class StrictAccelerator(accelerator.HostAccelerator):
    """Colossal-AI's view of the strict device."""

    def current_device(self) -> torch.device:
        return strict.DEVICE

    get_current_device = current_device

    def Stream(self, *args, **kwargs):
        return strict.Stream()

    def current_stream(self, device=None):
        return strict.device.current

    default_stream = current_stream

    def stream(self, stream):
        return torch.npu.stream(stream)

    def set_stream(self, stream):
        torch.npu.set_stream(stream)

    def synchronize(self, device=None):
        torch.npu.synchronize()


def call(function: str, arguments: dict, file: str, fault: str | None = None, watchdog: float | None = None):
    """Calls a function of this module with a runtime on the strict device; its result goes to a file on rank 0.

    Args:
        fault: one of `faults` to plant first.
        watchdog: seconds that a collective call on the device's tensors may take.
    """
    strict.install()
    runtime = launch(0)
    use_strict_device(runtime)
    if fault is not None:
        getattr(faults, fault)()
    if watchdog is not None:
        device.watchdog = timedelta(seconds=watchdog)
    result = globals()[function](runtime, **arguments)
    if runtime.is_main:
        Path(file).write_text(json.dumps(result))
    shutdown()


def use_strict_device(runtime: Runtime):
    use(runtime, StrictAccelerator())


def use_cpu(runtime: Runtime):
    use(runtime, accelerator.HostAccelerator())


def use(runtime: Runtime, kind: accelerator.HostAccelerator):
    """Runs of this runtime are on the accelerator's device from now on."""
    accelerator.set_accelerator(kind)
    runtime.device = runtime.communicator.device = kind.current_device()
    runtime.communicators.clear()  # communicators that know the old one
    # stages exchange tensors on the device, as they do with NCCL
    on_device = isinstance(kind, StrictAccelerator)
    p2p._check_device = (lambda group: (strict.DEVICE, True)) if on_device else CHECK_DEVICE
    p2p.dist.batch_isend_irecv = one_by_one if on_device else BATCH_ISEND_IRECV


def one_by_one(operations: list) -> list:
    """Sends and receives that torch would join where a backend of the device can."""
    return [one.op(one.tensor, group=one.group, tag=one.tag, **{WHO[one.op]: one.peer}) for one in operations]


def train(runtime: Runtime, jobs: dict[str, dict]) -> dict[str, dict]:
    """Whole runs, each on the CPU and on the strict device.

    Args:
        jobs: by name, `algorithm` and `settings`.

    Returns:
        by name, `cpu` and `strict`: what `run` gives.
    """
    results: dict[str, dict] = {}
    for name, job in jobs.items():
        results[name] = {}
        for kind, use_device in (("cpu", use_cpu), ("strict", use_strict_device)):
            use_device(runtime)
            output = str(Path(job["settings"]["output_dir"]) / kind)
            results[name][kind] = run(runtime, job["algorithm"], job["settings"] | {"output_dir": output})
    return results


def run(runtime: Runtime, algorithm: str, settings: dict) -> dict:
    """A run's metrics by step and where its weights were; or the error that it ended with."""
    config_class, trainer_class = trainer_classes(algorithm)
    steps = []
    try:
        trainer = trainer_class(configure(config_class, **settings), runtime)
        step = trainer.step

        def recorded(k):
            metrics = step(k)
            steps.append({name: x for name, x in metrics.items() if not name.startswith("seconds/")})
            return metrics

        trainer.step = recorded
        trainer.train()
    except Exception:  # whatever it is, the test says it
        traceback.print_exc()
        return {"error": traceback.format_exc()}
    devices = {p.device.type for engine in trainer.engines.values() for p in engine.module.parameters()}
    return {"steps": steps, "devices": sorted(devices)}


def waits_of_steps(runtime: Runtime, jobs: dict[str, dict]) -> dict[str, dict[str, int]]:
    """By job, what the host waits for in a trainer's first step, by place; without the tokens of decoding."""
    results = {}
    for name, job in jobs.items():
        config_class, trainer_class = trainer_classes(job["algorithm"])
        trainer = trainer_class(configure(config_class, **job["settings"]), runtime)
        with device.counting() as waits:
            trainer.step(0)
        results[name] = {place: n for place, n in waits.items() if not place.startswith("event.synchronize")}
    return results


SAMPLING = {
    "plain": {},
    "all": dict(top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, min_new_tokens=2, temperature=0.7),
    "greedy": dict(temperature=0.0),
}


def waits_of_decoding(runtime: Runtime, sizes: list[tuple[int, int]], samplings: list[str]) -> list[dict]:
    """What `waits_of_responses` gives for each size, which is (layers, rows), and each kind of sampling."""
    return [waits_of_responses(layers, rows, sampling) for layers, rows in sizes for sampling in samplings]


def waits_of_responses(layers: int, rows: int, sampling: str) -> dict:
    """What the host waits for in the steps of coati's engine, by place, and how many steps there were."""
    from coati.config.generation import GenerationConfig
    from coati.rollout.engine import RolloutEngine
    from coati.rollout.engine.batch import ContinuousBatch
    from coati.rollout.generator import Request

    config = GenerationConfig(max_new_tokens=16, **SAMPLING[sampling])
    engine = RolloutEngine(tiny_actor(layers).to(strict.DEVICE), config, eos_ids=[1], slots=rows)
    waits, steps = Counter(), []

    class Counted(ContinuousBatch):
        def step(self):
            with device.counting() as found:
                super().step()
            waits.update(found)
            steps.append(len(self.rows))

    engine.batch_class = Counted
    done = engine.generate([Request([3 + i, 4, *range(5, 5 + i % 4)], seed=i) for i in range(rows)])
    return {"waits": waits, "steps": len(steps), "tokens": [completion.ids for completion in done]}


def tiny_actor(layers: int):
    from transformers import LlamaConfig

    from coati.models import Actor

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    ends = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return Actor(config=LlamaConfig(**sizes, **ends, num_hidden_layers=layers))


def error_of(runtime: Runtime, algorithm: str, settings: dict) -> str:
    """What a run says that must fail; empty if it doesn't."""
    return run(runtime, algorithm, settings).get("error", "")


def error_of_rank_1(runtime: Runtime, algorithm: str, settings: dict) -> str:
    """The same, of the rank that waits."""
    error = error_of(runtime, algorithm, settings)
    store = torch.distributed.distributed_c10d._get_default_store()
    if not runtime.is_main:
        store.set("error", error)
    return store.get("error").decode()
