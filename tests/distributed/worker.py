"""What each rank of `forks.run_jobs` does: a list of tiny trainings in one process group, results to a JSON file.

A job is {"name", "algorithm", "settings"}, or one of `tests/trainers/steps.py`.
"""

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path

from coati.config import configure


def run(job: dict, runtime):
    """Metrics of every step, a fingerprint of the final weights, and one of every iteration's responses on each
    rank."""
    import torch

    from coati.models import actor
    from tests.conftest import trainer_classes
    from tests.trainers.steps import run_job

    if "variations" in job:
        return run_job(job, runtime)

    # logits for a few tokens at a time, as with a large vocabulary: for each micro-batch several parts, one incomplete
    actor.ROWS, actor.MAX_LOGITS = (7, {"cpu": 1}) if job.get("few_logits") else (128, {"cpu": 2**23})
    config_class, trainer_class = trainer_classes(job["algorithm"])
    trainer = trainer_class(configure(config_class, **job["settings"]), runtime)
    steps = []
    step = trainer.step

    def recorded(k):
        metrics = step(k)
        how = ("seconds/", "padding_share")
        steps.append({name: value for name, value in metrics.items() if not name.startswith(how)})
        return metrics

    trainer.step = recorded
    rollouts = record_rollouts(trainer) if job["algorithm"] in ("ppo", "grpo", "distill", "sdpo") else []
    trainer.train()
    norms = {}
    for name, engine in trainer.engines.items():
        for key, tensor in sorted(engine.state_dict().items()):
            projection = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float64)
            flat = tensor.double().flatten()
            norms[f"{name}.{key}"] = [flat.norm().item(), (flat * projection).sum().item()]
    return {"steps": steps, "weights": norms, "rollouts": runtime.communicator.gather(rollouts)}


def record_rollouts(trainer) -> list[str]:
    """A list that gets a hash of each iteration's tokens and log-probs, to the last bit."""
    seen, rollouts = [], trainer.rollouts.next

    def recorded(k):
        batch, metrics = rollouts(k)
        tensors = (batch.input_ids, batch.response_mask, batch.sampling_log_probs)
        seen.append(hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest())
        return batch, metrics

    trainer.rollouts.next = recorded
    return seen


def work(jobs: str, file: str, run: Callable = run):
    """All jobs of one file, one after the other."""
    from coati.parallel import launch
    from coati.parallel.runtime import shutdown
    from coati.trainers.main import end_process

    runtime = launch(0)
    results = {}
    for job in json.loads(Path(jobs).read_text()):
        try:
            results[job["name"]] = run(job, runtime)
        except Exception:
            traceback.print_exc()
            raise
    if runtime.is_main:
        Path(file).write_text(json.dumps(results))
    shutdown()
    end_process(0)
