"""Generation, scored samples, and the experience that policies are trained on."""

from coati.config.generation import GenerationConfig
from coati.rollout.batch import Experience, RolloutBatch, head_ids, head_log_probs, padded_routing
from coati.rollout.best_of import BestOf, best_of_n, best_of_n_kl
from coati.rollout.conversation import ConversationRenderer, check_conversations
from coati.rollout.engine import RolloutEngine
from coati.rollout.environment import Environment, Observation, load_environment
from coati.rollout.episodes import EpisodeSampler, rendering_of
from coati.rollout.generate import PolicyGenerator, complete, has_kv_cache
from coati.rollout.generator import Completion, FollowUps, Generator, Request
from coati.rollout.sampler import Prompt, ResponseSampler, Sampler, prompts_of_texts
from coati.rollout.source import RolloutShape, RolloutSource, ScoredGeneration, SynchronousRollouts, prompt_of
from coati.rollout.step_beam import step_beam_search
from coati.rollout.tools import describe_tools, has_tools

__all__ = [
    "BestOf",
    "Completion",
    "ConversationRenderer",
    "Environment",
    "EpisodeSampler",
    "Experience",
    "FollowUps",
    "GenerationConfig",
    "Generator",
    "Observation",
    "PolicyGenerator",
    "Prompt",
    "Request",
    "ResponseSampler",
    "RolloutBatch",
    "RolloutEngine",
    "RolloutSource",
    "Sampler",
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
    "head_ids",
    "head_log_probs",
    "load_environment",
    "padded_routing",
    "prompt_of",
    "prompts_of_texts",
    "rendering_of",
    "step_beam_search",
]
