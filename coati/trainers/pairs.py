"""What trainers on pairs share: prompts that are read once for both responses, accuracy with its interval, and both
responses of a sample."""

from typing import Any

from torch import Tensor

from coati.intervals import wilson_interval
from coati.models.packed import check_packing
from coati.parallel import resolve_precision
from coati.rollout.prompts import response_texts
from coati.trainers.config import PreferenceConfig, RewardConfig
from coati.trainers.supervised import SupervisedTrainer


def sharing_prompts(config: PreferenceConfig | RewardConfig) -> dict[str, int]:
    """What a model is called with beside a batch of pairs."""
    return {"shared_prefix_group": 2} if config.algorithm.share_prompts else {}


def check_shared_prompts(trainer: SupervisedTrainer, pairs: int):
    """Raises where the longest pairs of the data show that the model can't read a prompt once for both responses.

    Args:
        pairs: how many are looked at.
    """
    rows = trainer.data.lengths.argsort()[-pairs:].tolist()
    batches = [trainer.inputs(trainer.load(trainer.data, [row])) for row in rows]
    exact = resolve_precision(trainer.config.parallel) == "fp32"
    check_packing(trainer.model.module, trainer.model.forward_all, batches, exact)


def finalize_pairs(sums: dict[str, float]) -> dict[str, float]:
    """Means over pairs from sums with their number, `pairs`; accuracy with its 95 % interval."""
    pairs = sums["pairs"]
    metrics = {name: total / pairs for name, total in sums.items()}
    low, high = wilson_interval(metrics["accuracy"], pairs)
    return metrics | {"accuracy_low": low, "accuracy_high": high, "pairs": pairs}


def pair_scores(chosen: Tensor, rejected: Tensor) -> list[tuple[float, float]]:
    """Rewards `[pairs]` of both sides, pair by pair."""
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def pair_samples(tokenizer, data, scores: dict[int, tuple[float, float]]) -> list[dict[str, Any]]:
    """Two rows per pair: prompt, response, side and reward.

    Args:
        scores: of the chosen and the rejected response, by row of the data.
    """
    samples = []
    for row, rewards in scores.items():
        for side, reward in zip(("chosen", "rejected"), rewards, strict=True):
            text = text_of(tokenizer, getattr(data[row], side))
            samples.append(text | {"reward": reward, "side": side})
    return samples


def text_of(tokenizer, sequence) -> dict[str, str]:
    """Prompt and response of a row that ends with the response."""
    start = sequence.loss_mask.index(True)
    [response] = response_texts(tokenizer, [sequence.input_ids[start:]])
    return {"prompt": tokenizer.decode(sequence.input_ids[:start]), "response": response.strip()}
