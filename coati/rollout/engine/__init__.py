"""coati's own generator: continuous batching over slots, on CPUs and GPUs."""

from coati.rollout.engine.engine import RolloutEngine

__all__ = ["RolloutEngine"]
