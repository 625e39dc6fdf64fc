"""Generation and the experience it produces."""

from coati.rollout.experience import Experience
from coati.rollout.generate import GenerationConfig, Rollout, generate

__all__ = ["Experience", "GenerationConfig", "Rollout", "generate"]
