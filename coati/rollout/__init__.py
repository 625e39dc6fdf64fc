"""Generation and the experience it produces."""

from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.experience import Experience
from coati.rollout.generate import GenerationConfig, Rollout, generate

__all__ = ["BestOf", "Experience", "GenerationConfig", "Rollout", "best_of_n", "best_of_n_kl", "generate"]
