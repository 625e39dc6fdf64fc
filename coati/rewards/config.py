"""The rewards of a run, from its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from coati.config import option
from coati.errors import UserError
from coati.rewards.base import Reward, WeightedRewards
from coati.rewards.classifier import PLAIN, SequenceClassifierReward
from coati.rewards.function import load_function
from coati.rewards.http import HTTPReward


@dataclass
class ScoringConfig:
    """What scores answers, for every algorithm that learns from a reward."""

    reward_model: str | None = option(None, "folder of a reward model that uses the policy's tokenizer")
    reward_model_weight: float = option(1.0, "its weight in the sum of rewards")
    reward_functions: list[str] = option((), "FILE.py:function or module:function, called with prompts and responses")
    reward_function_weights: list[float] | None = option(None, "one weight a function; 1 each if not given")
    reward_classifiers: list[str] = option((), "folders or names of sequence classifiers with tokenizers of their own")
    reward_classifier_weights: list[float] | None = option(None, "one weight a classifier; 1 each if not given")
    reward_classifier_tokenizer: str | None = option(None, "their tokenizer, if it isn't in their folders")
    reward_classifier_label: str | None = option(None, "name or index of the label whose logit is the reward")
    reward_classifier_output: Literal["logit", "log_prob", "probability"] = option("logit", "what is read of it")
    reward_classifier_template: str = option(
        PLAIN, "the text that is scored; chat for the tokenizer's chat template, pair for a pair of texts"
    )
    reward_classifier_max_length: int | None = option(
        None, "of that text, in tokens; all that the model reads if not given"
    )
    reward_classifier_truncation_side: Literal["left", "right"] = option("left", "the side that longer texts lose")
    reward_classifier_padding_side: Literal["left", "right"] | None = option(
        None, "the side that is padded; right for decoders, the tokenizer's own for encoders, if not given"
    )
    reward_classifier_pad_token: str | None = option(
        None, "what fills rows; the tokenizer's pad token, else EOS, if not given"
    )
    reward_urls: list[str] = option((), "HTTP endpoints that score responses, see docs/rewards.md")
    reward_url_weights: list[float] | None = option(None, "one weight an endpoint; 1 each if not given")
    reward_timeout: float = option(60.0, "seconds that an endpoint may take for a batch")
    reward_retries: int = option(3, "further tries where it fails, after 1, 2, 4, ... seconds")
    reward_batch_size: int = option(16, "responses that a classifier or an endpoint gets at a time")
    reward_clip: float | None = option(None, "scores are clamped to +- this")
    normalise_reward: bool = option(False, "scores are normalised by their running mean and standard deviation")
    missing_eos_penalty: float | None = option(None, "taken off the score of an answer that does not end by itself")


def load_rewards(
    config: ScoringConfig,
    model: Reward | None = None,
    device: torch.device | str = "cpu",
    given: Sequence[Reward] = (),
) -> WeightedRewards:
    """The rewards of a run.

    Args:
        model: the reward model of `config.reward_model`, loaded.
        device: where classifiers run.
        given: further rewards, of weight 1.

    Raises:
        UserError: no reward at all, or not one weight a function, classifier or endpoint; one can't be loaded.
    """
    c = config
    if c.reward_batch_size < 1 or c.reward_retries < 0 or c.reward_timeout <= 0:
        raise UserError("reward_batch_size must be at least 1, reward_retries at least 0, reward_timeout above 0")
    rewards = [] if model is None else [(model, c.reward_model_weight)]
    rewards += [(reward, 1.0) for reward in given]
    for place, weight in _weighted("function", c.reward_functions, c.reward_function_weights):
        rewards.append((load_function(place), weight))
    for source, weight in _weighted("classifier", c.reward_classifiers, c.reward_classifier_weights):
        rewards.append((_load_classifier(source, c, device), weight))
    for url, weight in _weighted("url", c.reward_urls, c.reward_url_weights):
        options = dict(timeout=c.reward_timeout, retries=c.reward_retries, batch_size=c.reward_batch_size)
        rewards.append((HTTPReward(url, **options), weight))
    if not rewards:
        raise UserError(
            "no reward: give --reward_model FOLDER, --reward_functions FILE.py:function, --reward_classifiers FOLDER "
            "or --reward_urls URL"
        )
    return WeightedRewards(rewards)


def _weighted(kind: str, sources: list[str], weights: list[float] | None) -> list[tuple[str, float]]:
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise UserError(f"reward_{kind}_weights has {len(weights)} entries for {len(sources)} reward {kind}s")
    return list(zip(sources, weights, strict=True))


def _load_classifier(source: str, config: ScoringConfig, device) -> Reward:
    names = ("tokenizer", "label", "output", "template", "max_length", "truncation_side", "padding_side", "pad_token")
    options = {name: getattr(config, f"reward_classifier_{name}") for name in names}
    return SequenceClassifierReward(source, batch_size=config.reward_batch_size, device=device, **options)
