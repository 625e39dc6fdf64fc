"""The rewards of a run, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coati.config import Settings, option
from coati.errors import UserError
from coati.rewards.answers import Style

if TYPE_CHECKING:  # settings are read before torch is loaded
    import torch

    from coati.rewards.base import Reward
    from coati.rewards.scorer import Scorer

PLAIN = "{prompt}{response}"


@dataclass
class ScoringConfig(Settings):
    """What scores responses, for every algorithm that learns from a reward."""

    reward_model: str | None = option(
        None, "folder of a reward model that uses the policy's tokenizer", path="model", common=True
    )
    reward_model_weight: float = option(1.0, "its weight in the sum of rewards")
    reward_functions: list[str] = option(
        (), "FILE.py:function or module:function, called with prompts and responses", path="function", common=True
    )
    reward_function_weights: list[float] | None = option(None, "one weight a function; 1 each if not given")
    verifiers: list[str] = option(
        (),
        "rewards by rule: math, gsm8k, choice, exact, regex, format, json, reasoning_gym, python; see docs/rewards.md",
        common=True,
    )
    verifier_weights: list[float] | None = option(None, "one weight a verifier; 1 each if not given")
    answer_column: str = option(
        "answer", "the data's column with the right answer, for verifiers; a.b for the field b of an object a"
    )
    answer_style: Style = option(
        "stated",
        "what math, gsm8k and choice read: boxed (a box alone), marked (also what follows `The answer is` or ####), "
        "stated (also a last line that is the answer), anywhere (also the last number of all); see docs/rewards.md",
    )
    regex_pattern: str | None = option(
        None, "what the verifier regex looks for; its first group, if any, is the answer"
    )
    format_tags: list[str] = option(("think", "answer"), "the tags that the verifier format wants, in this order")
    json_schema: str | None = option(None, "file with the schema of the verifier json", path="file")
    tests_column: str = option("tests", "the data's column with the unit tests, for the verifier python")
    python_timeout: float = option(10.0, "seconds that a program with its tests may take", gt=0)
    allow_code_execution: bool = option(False, "responses may be run: by the verifier python, in a sandbox")
    reward_workers: int = option(
        1, "processes that score responses by rule while others are generated; 0 for none", ge=0
    )
    reward_failure_score: float = option(0.0, "the score of a response that such a reward fails for")
    reward_classifiers: list[str] = option(
        (), "folders or names of sequence classifiers with tokenizers of their own", path="model"
    )
    reward_classifier_weights: list[float] | None = option(None, "one weight a classifier; 1 each if not given")
    reward_classifier_tokenizer: str | None = option(
        None, "their tokenizer, if it isn't in their folders", path="model"
    )
    reward_classifier_label: str | None = option(None, "name or index of the label whose logit is the reward")
    reward_classifier_output: Literal["logit", "log_prob", "probability"] = option("logit", "what is read of it")
    reward_classifier_template: str = option(
        PLAIN, "the text that is scored; chat for the tokenizer's chat template, pair for a pair of texts"
    )
    reward_classifier_max_length: int | None = option(
        None, "of that text, in tokens; all that the model reads if not given", ge=1
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
    reward_timeout: float = option(
        60.0, "seconds that an endpoint may take for a batch, or a worker for a response", gt=0
    )
    reward_retries: int = option(3, "further tries where it fails, after 1, 2, 4, ... seconds", ge=0)
    reward_batch_size: int = option(16, "responses that a classifier or an endpoint gets at a time", ge=1)
    reward_clip: float | None = option(None, "scores are clamped to +- this", gt=0)
    normalise_reward: bool = option(False, "scores are normalised by their running mean and standard deviation")
    missing_eos_penalty: float | None = option(
        None, "taken off the score of a response that does not end by itself", ge=0
    )


def load_rewards(
    config: ScoringConfig, model: Reward | None = None, device: torch.device | str = "cpu", given: Sequence[Reward] = ()
) -> Scorer:
    """The rewards of a run.

    Args:
        model: the reward model of `config.reward_model`, loaded.
        device: where classifiers run.
        given: further rewards, of weight 1.

    Raises:
        UserError: no reward at all, or not one weight a function, verifier, classifier or endpoint; one can't be
            loaded.
    """
    from coati.rewards.function import load_function
    from coati.rewards.http import HTTPReward
    from coati.rewards.scorer import Scorer
    from coati.rewards.verifiable import make_verifier

    c = config
    if "python" in c.verifiers and c.reward_timeout <= c.python_timeout:
        raise UserError("reward_timeout ends whatever scores a response: it must be above python_timeout")
    rewards = [] if model is None else [(model, c.reward_model_weight)]
    rewards += [(reward, 1.0) for reward in given]
    for place, weight in _weighted("reward_function", c.reward_functions, c.reward_function_weights):
        rewards.append((load_function(place), weight))
    for name, weight in _weighted("verifier", c.verifiers, c.verifier_weights):
        rewards.append((make_verifier(name, c), weight))
    for source, weight in _weighted("reward_classifier", c.reward_classifiers, c.reward_classifier_weights):
        rewards.append((_load_classifier(source, c, device), weight))
    for url, weight in _weighted("reward_url", c.reward_urls, c.reward_url_weights):
        options = dict(timeout=c.reward_timeout, retries=c.reward_retries, batch_size=c.reward_batch_size)
        rewards.append((HTTPReward(url, **options), weight))
    if not rewards:
        raise UserError(
            "no reward: give --reward_model FOLDER, --reward_functions FILE.py:function, --verifiers NAME, "
            "--reward_classifiers FOLDER or --reward_urls URL"
        )
    limits = dict(timeout=c.reward_timeout, failure_score=c.reward_failure_score)
    return Scorer(rewards, workers=c.reward_workers, **limits)


def _weighted(kind: str, sources: list[str], weights: list[float] | None) -> list[tuple[str, float]]:
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise UserError(f"{kind}_weights has {len(weights)} entries for {len(sources)} {kind.replace('_', ' ')}s")
    return list(zip(sources, weights, strict=True))


def _load_classifier(source: str, config: ScoringConfig, device) -> Reward:
    from coati.rewards.classifier import SequenceClassifierReward

    names = ("tokenizer", "label", "output", "template", "max_length", "truncation_side", "padding_side", "pad_token")
    options = {name: getattr(config, f"reward_classifier_{name}") for name in names}
    return SequenceClassifierReward(source, batch_size=config.reward_batch_size, device=device, **options)
