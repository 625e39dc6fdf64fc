"""Generation, scored samples, and what is learned from them."""

from coati.config.generation import GenerationConfig
from coati.rollout.batch import Experience, RolloutBatch
from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.engine import RolloutEngine
from coati.rollout.generate import PolicyGenerator, complete, has_keys_and_values
from coati.rollout.generator import Completion, Generator, Request
from coati.rollout.source import Prompt, RolloutSource, ScoredGeneration, Shape, SynchronousRollouts, prompt_of

__all__ = [
    "BestOf",
    "Completion",
    "Experience",
    "GenerationConfig",
    "Generator",
    "PolicyGenerator",
    "Prompt",
    "Request",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutSource",
    "ScoredGeneration",
    "Shape",
    "SynchronousRollouts",
    "best_of_n",
    "best_of_n_kl",
    "complete",
    "has_keys_and_values",
    "prompt_of",
]
