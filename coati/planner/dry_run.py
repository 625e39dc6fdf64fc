"""A run's peak memory on one rank: the algorithm's trainer runs a step with models without weights.

What the trainer makes and does is its own code; what a plugin keeps is defined beside its engine in `coati.parallel`.
This module has the workload, the parts of it that one rank has, and the extrapolation to deep models from few layers.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from coati.config import reconfigure
from coati.models.lora import base_of_adapter, is_adapter
from coati.parallel.runtime import quiet_colossalai
from coati.planner.experts import products_without_data
from coati.planner.factory import PlannedFactory, PlannedRuntime
from coati.planner.live import Item, LiveMemory
from coati.planner.parallel import Part, sizes
from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.config import PPOConfig, RolloutConfig

FEW_LAYERS = (4, 8)  # of a pipeline's stage: with fewer, the phases of its backward pass are other ones than with many


@dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
        algorithm: of `ALGORITHMS`; `config` is its settings.
        model_config: transformers config of the model that is trained.
        other_configs: those of further models, by their names in the settings; `model_config` where one is missing.
        gpus: processes, one per GPU.
        on_gpu: False for a run on CPUs.
    """

    algorithm: str
    config: object
    model_config: object
    gpus: int
    on_gpu: bool = True
    other_configs: dict[str, object] = field(default_factory=dict)

    def model_config_of(self, source) -> object:
        return self.other_configs.get(str(source), self.model_config)

    def base_of(self, source) -> str:
        """The folder that a model has its weights from, except for those of adapters."""
        source = source or self.config.model.path or "new"
        return str(Path(base_of_adapter(source) if is_adapter(source) else source).resolve())


@dataclass(frozen=True)
class Plan:
    """Bytes of every item on one rank, at the peak of every phase."""

    phases: dict[str, Counter[Item]] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> Counter[Item]:
        return self.phases[self.worst]


def plan(workload: Workload) -> Plan:
    """The peak of every phase of the run.

    Raises:
        UserError: settings that the run doesn't support.
    """
    quiet_colossalai()
    stages = workload.config.parallel.pipeline_parallel
    few, more = (stages * layers for layers in FEW_LAYERS)
    depths: dict[str, int] = {}
    peaks = _peaks(workload, more, depths)
    if max(depths.values()) > more:
        peaks = _extrapolate({few: _peaks(workload, few, depths), more: peaks}, depths)
    phases: dict[str, Counter[Item]] = {}
    for name, items in peaks.items():
        phase = name.split(":")[0]
        if items.total() > phases.get(phase, Counter()).total():
            phases[phase] = items
    return Plan(phases)


def _extrapolate(peaks: dict[int, dict], depths: dict[str, int]) -> dict[str, Counter[Item]]:
    """Extrapolates linearly from two depths, item by item.

    Args:
        peaks: of models of so many layers, by phase.
        depths: layers of the models, by name.
    """
    (fewest, few), (most, more) = sorted(peaks.items())
    line = {}
    for phase in more:
        line[phase] = Counter()
        for item in set(few[phase]) | set(more[phase]):
            depth = depths.get(item[0], max(depths.values()))
            low, high = min(fewest, depth), min(most, depth)
            steps = (depth - low) / max(high - low, 1)
            value = few[phase][item] + steps * (more[phase][item] - few[phase][item])
            line[phase][item] = max(0, round(value))
    return line


def _peaks(workload: Workload, layers: int, depths: dict[str, int]) -> dict[str, Counter[Item]]:
    """The peak over the pipeline's stages, of which the first and the last keep most.

    Args:
        layers: of the models, at most.
        depths: filled with their real depths, by name.
    """
    worst: dict[str, Counter[Item]] = {}
    of_run = sizes(workload.config.parallel, workload.gpus)
    for stage in sorted({0, of_run.pipeline - 1}):
        for name, items in _dry_run_step(workload, layers, Part(of_run, stage), depths).items():
            if items.total() > worst.get(name, Counter()).total():
                worst[name] = items
    return worst


def _dry_run_step(workload: Workload, layers: int, part: Part, depths: dict[str, int]) -> dict[str, Counter[Item]]:
    """An evaluation and a step of the run's own trainer."""
    live = LiveMemory()
    with tempfile.TemporaryDirectory() as folder:
        config = _planning_settings(workload, Path(folder))

        def base_of(source) -> str:
            return workload.base_of(None if source == config.model.path else source)

        factory = partial(PlannedFactory, live, workload.model_config_of, base_of, layers, part, workload.on_gpu)
        runtime = PlannedRuntime(workload.gpus)
        trainer = ALGORITHMS[workload.algorithm].trainer()(config, runtime, make_factory=factory)
        try:
            depths |= trainer.factory.depths
            live.peaks.clear()
            with live, products_without_data():
                live.begin_phase("evaluate")
                trainer.evaluate()
                trainer.step(0)
        finally:
            trainer.folder.release()
    return live.peaks


def _planning_settings(workload: Workload, folder: Path):
    """The settings of the run, except for paths that are read or written."""
    c = workload.config
    (folder / "cache").mkdir()
    changes = dict(
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        resume="never",
        train_data=["train"],
        train_weights=None,
        eval_data=["eval"] if c.data.eval_data else [],
        evaluators=[],
        deterministic=False,
    )
    if c.model.path is None or not is_adapter(c.model.path):
        changes["model"] = str(folder / "model")
        workload.model_config.save_pretrained(folder / "model")
    if isinstance(c, PPOConfig) and c.algorithm.ptx_data:
        changes["ptx_data"] = ["texts"]
    if isinstance(c, RolloutConfig) and hasattr(c.algorithm, "ppo_epochs"):
        changes["ppo_epochs"] = 1  # all are alike
    return reconfigure(c, **changes)
