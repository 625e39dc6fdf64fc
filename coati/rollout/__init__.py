"""Generation and the experience it produces."""

from coati.config.generation import GenerationConfig
from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.engine import RolloutEngine
from coati.rollout.experience import Experience
from coati.rollout.generate import Rollout, generate
from coati.rollout.generator import Completion, Generator, Request

__all__ = [
    "BestOf",
    "Completion",
    "Experience",
    "GenerationConfig",
    "Generator",
    "Request",
    "Rollout",
    "RolloutEngine",
    "best_of_n",
    "best_of_n_kl",
    "generate",
]
