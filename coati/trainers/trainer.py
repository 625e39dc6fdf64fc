"""What the trainer of every algorithm has: settings, ranks, a folder, a factory, engines, and a place in the run.

An algorithm fills in `build`, `step` and `evaluate`; `coati.trainers.loop` runs them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.models.lora import is_adapter
from coati.parallel import Engine, Runtime, check_plugin
from coati.parallel.runtime import seed_everything, use_deterministic_kernels
from coati.rewards import import_function
from coati.run_layout import training_state_in
from coati.trainers.config import TrainerConfig
from coati.trainers.factory import Factory
from coati.trainers.folder import RunFolder
from coati.trainers.loop import run
from coati.trainers.resume import OTHER_ROWS
from coati.trainers.schedule import learning_rate_at


class Trainer:
    """An algorithm with all that it needs for a run.

    Args:
        make_factory: makes the factory of data and models; that of `coati plan` makes models without weights.

    Attributes:
        algorithm: its name in logs and reports.
        best_metric: the evaluation metric that tells the best checkpoint, and whether higher is better.
        learns_responses: whether it learns the data's responses, which the chat template must then write and end.
        ranks: those that see different data.
        data: the training data (`coati.data.build_dataset`).
        engines: the trained models by name, saved with every checkpoint; the first is the run's product.
        frozen: models that are saved with every checkpoint although no optimizer moves them.
        steps_done: optimizer steps (of rollout algorithms: iterations) so far; total_steps: of the whole run.
        start: the step that this run begins with, and the rows of training data that were seen before it.
    """

    algorithm: str
    best_metric: tuple[str, bool]
    learns_responses = True
    data: Any
    total_steps: int

    def __init__(self, config: TrainerConfig, runtime: Runtime, *, make_factory: Callable[..., Factory] = Factory):
        self.config, self.runtime, self.make_factory = config, runtime, make_factory
        if config.parallel.device == "cpu" and runtime.device.type != "cpu":
            raise UserError("device is cpu, but this process uses a GPU already: start it with CUDA_VISIBLE_DEVICES=")
        adapts = config.model.lora_rank > 0 or any(is_adapter(source) for source in config.models)
        check_plugin(config.parallel, lora=adapts, world_size=runtime.world_size)
        self.ranks = runtime.data_ranks(config.parallel.model_parallel_size)
        config.check(self.ranks.world_size)
        if config.model.lora_rank > 0 and config.model.path is None:
            raise UserError("LoRA adapts a trained model: give --model FOLDER, or train all weights (--lora_rank 0)")
        self.evaluators = [import_function(place, "evaluator") for place in config.evaluation.evaluators]
        self.engines: dict[str, Engine] = {}
        self.frozen: dict[str, Engine] = {}
        self.folder = RunFolder(config, runtime, self.algorithm)
        try:
            self._prepare()
        except BaseException:
            self.folder.release()
            raise

    def _prepare(self):
        """Loads data and models, and what the checkpoint holds of them."""
        stored = self.folder.stored
        self.start = (stored.get("step", 0), stored.get("rows", 0))
        self.steps_done = self.start[0]
        self.factory = self.make_factory(self.config, self.runtime, learns_responses=self.learns_responses)
        use_deterministic_kernels(self.config.deterministic)
        seed_everything(self.config.seed)  # models are created alike on every rank
        self.build()
        # from here on ranks draw their own, but for those that share one model's work
        seed_everything(self.config.seed + 1 + self.ranks.rank)
        if stored:
            self._restore(stored)

    # --- for the algorithm to fill in

    def build(self):
        """Makes `self.data`, models and `self.engines`; sets `total_steps`."""
        raise NotImplementedError

    def step(self, k: int) -> dict[str, float]:
        """Step k: its metrics, the same on every rank; `tokens` are those it went through on all of them."""
        raise NotImplementedError

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics (without prefix) and sample rows, on the evaluation data."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the algorithm must remember besides models and random states, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]):
        """The inverse of `state`."""

    def save_files(self, checkpoint: Path):
        """Writes, and syncs, what the algorithm must remember in files of its own; called on all ranks."""

    # --- the run

    def train(self):
        """Runs to the end, or to the step after a stop was asked for (SIGTERM): then it saves and returns."""
        run(self)

    @property
    def tokenizer(self):
        return self.factory.tokenizer

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out because the loss or a gradient was not finite."""
        return sum(engine.skipped_steps for engine in self.engines.values())

    def learning_rate(self, k: int, peak: float) -> float:
        """The learning rate of step k: a function of the step alone, so nothing of it is stored."""
        o = self.config.optimizer
        return learning_rate_at(k, self.total_steps, peak, o.schedule, o.warmup, o.final_rate)

    def rows_before(self, k: int) -> int:
        """Rows of the batches before step k, whatever size they had."""
        first, rows = self.start
        return rows + (k - first) * self.config.batch_size

    def data_key(self) -> str:
        """Tells the training data from other data."""
        return self.data.key

    def save(self, score: float | None):
        """Writes a checkpoint of the steps that are done."""
        state = {
            "algorithm": self.algorithm,
            "step": self.steps_done,
            "state": self.state(),
            "skipped_steps": {name: engine.skipped_steps for name, engine in self.engines.items()},
            "expert_shares": {name: engine.expert_load.shares for name, engine in self.engines.items()},
            "world_size": self.runtime.world_size,
            "plugin": self.config.parallel.plugin,
            "rows": self.rows_before(self.steps_done),
            "data": self.data_key(),
            "settings": self.folder.settings,
        }
        models = (self.engines, self.frozen, self.tokenizer)
        self.folder.save_checkpoint(self.steps_done, *models, state, score, self.save_files)

    def _restore(self, stored: dict[str, Any]):
        if stored.get("data", self.data_key()) != self.data_key():
            self.runtime.say(OTHER_ROWS)
        self.load_state(stored["state"])
        for name, engine in self.engines.items():
            engine.load_optimizer(training_state_in(self.folder.resumed_from, name))
            engine.skipped_steps = stored["skipped_steps"][name]
            engine.expert_load.shares = stored.get("expert_shares", {}).get(name)
        if not self.folder.checkpoints.restore_random_state(self.folder.resumed_from):
            self.runtime.say(
                f"{self.folder.resumed_from} was written by {stored['world_size']} processes, now there are "
                f"{self.runtime.world_size}: weights, optimizer and data order go on exactly, sampling and dropout "
                "start from new random states"
            )
            seed_everything(self.config.seed + 1 + self.ranks.rank + 1000 * self.steps_done)
