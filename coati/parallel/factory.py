"""Which engine a configuration asks for."""

from torch import nn

from coati.config.plugin import PluginConfig
from coati.parallel.ddp import DDPEngine
from coati.parallel.engine import Engine
from coati.parallel.gemini import GeminiEngine
from coati.parallel.memory import EngineMemory
from coati.parallel.runtime import Runtime
from coati.parallel.zero import ZeroEngine

ENGINES = {
    "ddp": DDPEngine,
    "zero1": ZeroEngine,
    "zero2": ZeroEngine,
    "zero2-offload": ZeroEngine,
    "gemini": GeminiEngine,
}


def engine_class(config: PluginConfig) -> type[Engine]:
    """The class of engine; the hybrid one imports colossalai, and so only where it is asked for."""
    if not config.splits_models:
        return ENGINES[config.plugin]
    from coati.parallel.hybrid import HybridEngine

    return HybridEngine


def memory_class(config: PluginConfig) -> type[EngineMemory]:
    """The memory of its engines; a split model has that of the plugin around it."""
    return ENGINES[config.plugin].memory


def describing_class(config: PluginConfig) -> type[Engine]:
    """The class that describes an engine's memory and dtypes, without colossalai."""
    return Engine if config.splits_models else ENGINES[config.plugin]


def make_engine(
    module: nn.Module, config: PluginConfig, runtime: Runtime, *, generates: bool = False, **settings
) -> Engine:
    """An engine around a model.

    Args:
        generates: whether `full()` will be used (under pipeline parallelism that takes a copy of the model).
        **settings: those of `Engine`.
    """
    kind = engine_class(config)
    if config.pipeline_parallel > 1:
        settings |= {"generates": generates}
    return kind(module, config, runtime, **settings)
