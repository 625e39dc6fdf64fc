"""What samples from a policy, as a run's settings say."""

from coati.models import Actor
from coati.rollout import (
    EpisodeSampler,
    Generator,
    ResponseSampler,
    Sampler,
    check_conversations,
    load_environment,
    rendering_of,
)
from coati.rollout.prompts import eos_ids
from coati.trainers.config import RolloutConfig


def make_sampler(config: RolloutConfig, generator: Generator, policy: Actor, tokenizer) -> Sampler:
    """What samples single responses, or episodes with the settings' environment.

    Raises:
        UserError: an environment that can't be loaded, or that the chat template can't write a conversation with.
    """
    ends, settings = eos_ids(tokenizer, policy), config.environment
    if settings.path is None:
        return ResponseSampler(generator, tokenizer, ends, config.heads)
    environment = load_environment(settings.path)
    renderer, call_format = rendering_of(
        environment, tokenizer, ends, settings.call_format, config.data.template_arguments
    )
    return EpisodeSampler(generator, tokenizer, ends, environment, renderer, settings, call_format)


def notes_on(sampler: Sampler) -> list[str]:
    """Lines for the user on what the chat template does to conversations."""
    return check_conversations(sampler.renderer) if isinstance(sampler, EpisodeSampler) else []
