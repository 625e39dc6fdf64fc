"""`worker.py` with a mistake planted in the losses of the last rank, at the calls that a job's `spoil` names.

A job's settings are those of its trainer; its `spoil` is {"model": whose loss, "step": from 0, "kind": `loss` (the loss
is NaN) or `gradient` (the loss is as it was, its gradient is not finite)}.
"""

import torch

from tests.conftest import trainer_classes
from tests.distributed import worker
from tests.trainers.steps import change_losses


def run(job: dict, runtime) -> dict:
    """What `worker.run` gives, and by step: which models' weights or optimizer state moved in it on some rank, and
    whether all ranks have the same weights after it (nothing where they hold different ones)."""
    _, trainer_class = trainer_classes(job["algorithm"])
    plant, moved, alike = job["spoil"], [], []
    step_of = trainer_class.step

    def step(self, k):
        if not moved:
            is_here = runtime.rank == runtime.world_size - 1

            def spoil(share, metrics):
                spoils = is_here and self.steps_done == plant["step"]
                return spoiled(share, metrics, plant["kind"]) if spoils else (share, metrics)

            change_losses(self.engines[plant["model"]], spoil)
        before = [everything(engine) for engine in self.engines.values()]
        result = step_of(self, k)
        after = [everything(engine) for engine in self.engines.values()]
        changed = [not same(*pair) for pair in zip(before, after, strict=True)]
        moved.append([n for n, yes in zip(self.engines, changed, strict=True) if runtime.communicator.any(yes)])
        parallel = self.config.parallel
        if parallel.model_parallel_size == 1 and parallel.plugin != "gemini":
            engines = self.engines.values()
            weights = torch.cat([p.detach().flatten() for engine in engines for p in engine.module.parameters()])
            alike.append(all(torch.equal(weights, theirs) for theirs in runtime.communicator.gather(weights)))
        return result

    trainer_class.step = step
    try:
        return worker.run(job, runtime) | {"moved": moved, "alike": alike}
    finally:
        trainer_class.step = step_of


def spoiled(share: torch.Tensor, metrics: dict, kind: str):
    if kind == "gradient":  # the root's slope at 0 is infinite
        return share + (0.0 * share).sqrt(), metrics
    share = share * float("nan")
    return share, metrics | {name: value + share.detach() for name, value in metrics.items() if "loss" in name}


def everything(engine) -> dict[str, torch.Tensor]:
    """Copies of the weights (on rank 0) and of this rank's optimizer state and master weights."""
    tensors = dict(engine.state_dict())
    for i, state in enumerate(engine.optimizer.optim.state.values()):
        tensors |= {f"state.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors |= {f"master.{i}": tensor for i, tensor in enumerate(engine.master_weights())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def work(jobs: str, file: str):
    worker.work(jobs, file, run)
