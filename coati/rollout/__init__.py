"""Generation and the experience it produces."""

from coati.config.generation import GenerationConfig
from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.engine import Completion, Request, RolloutEngine
from coati.rollout.experience import Experience
from coati.rollout.generate import Rollout, generate

__all__ = [
    "BestOf",
    "Completion",
    "Experience",
    "GenerationConfig",
    "Request",
    "Rollout",
    "RolloutEngine",
    "best_of_n",
    "best_of_n_kl",
    "generate",
]
