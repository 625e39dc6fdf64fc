"""Generation, scored samples, and the experience that policies are trained on."""

from coati.config.generation import GenerationConfig
from coati.rollout.batch import Experience, RolloutBatch
from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.conversation import ConversationRenderer, check_conversations
from coati.rollout.engine import RolloutEngine
from coati.rollout.environment import Environment, Observation, load_environment
from coati.rollout.episodes import EpisodeGeneration, rendering_of
from coati.rollout.generate import PolicyGenerator, complete, has_kv_cache
from coati.rollout.generator import Completion, FollowUps, Generator, Request
from coati.rollout.source import Prompt, RolloutShape, RolloutSource, ScoredGeneration, SynchronousRollouts, prompt_of
from coati.rollout.tools import describe_tools, has_tools

__all__ = [
    "BestOf",
    "Completion",
    "ConversationRenderer",
    "Environment",
    "EpisodeGeneration",
    "Experience",
    "FollowUps",
    "GenerationConfig",
    "Generator",
    "Observation",
    "PolicyGenerator",
    "Prompt",
    "Request",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutSource",
    "ScoredGeneration",
    "RolloutShape",
    "SynchronousRollouts",
    "best_of_n",
    "best_of_n_kl",
    "check_conversations",
    "complete",
    "describe_tools",
    "has_kv_cache",
    "has_tools",
    "load_environment",
    "prompt_of",
    "rendering_of",
]
