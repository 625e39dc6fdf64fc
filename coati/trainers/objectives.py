"""Reward modeling of several objectives: scores for a whole response, learned by regression (HelpSteer2, 2406.08673;
the first stage of ArmoRM, 2406.12845, eq. 1).

    loss = mean over given scores of (prediction - score)^2

A response need not have a score of every objective. Departure from ArmoRM, which learns the head alone: all weights are
trained.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coati.data import collate_scored
from coati.losses import objective_loss
from coati.losses.masking import masked
from coati.models import ObjectiveRewardModel
from coati.rollout.source import correlation
from coati.trainers.config import RewardConfig
from coati.trainers.pairs import text_of
from coati.trainers.supervised import SupervisedTrainer


class ObjectiveTrainer(SupervisedTrainer):
    """Trains an `ObjectiveRewardModel` on scores."""

    config: RewardConfig
    algorithm, kind, model_class = "reward", "scored", ObjectiveRewardModel
    best_metric = ("loss", False)

    @property
    def objectives(self) -> list[str]:
        return self.config.algorithm.objectives

    def load_data(self, sources, weights=None, part_column=None):
        return self.factory.dataset(sources, self.kind, weights, part_column=part_column, objectives=self.objectives)

    def make_model(self, start):
        lora = self.config.model.lora
        return self.factory.model(ObjectiveRewardModel, start, lora=lora, objectives=self.objectives)

    def collate(self, samples):
        return collate_scored(samples, self.factory.pad_id)

    def count(self, batch):
        return batch.given.sum()

    def loss(self, predictions, batch, denominator):
        return objective_loss(predictions, batch.scores, batch.given, denominator)

    def accumulate(self, predictions, batch, rows):
        return objective_sums(predictions, batch.scores, batch.given & rows[:, None], self.objectives)

    def finalize(self, sums):
        return objective_metrics(sums, self.objectives)

    def row_scores(self, predictions, batch, rows):
        """The predicted and the given scores."""
        return list(zip(predictions[rows].tolist(), batch.scores[rows].tolist(), strict=True))

    def samples(self, row_scores):
        return [
            text_of(self.tokenizer, self.eval_data[row].sequence)
            | {"predicted": in_words(self.objectives, predicted), "scores": in_words(self.objectives, given)}
            for row, (predicted, given) in row_scores.items()
        ]


def objective_sums(predictions: Tensor, scores: Tensor, given: Tensor, objectives: Sequence[str]) -> dict[str, Tensor]:
    """By `OBJECTIVE/NAME`, over the given scores: the sums that `correlation` is told, and that of squared errors.

    Args:
        predictions, scores: `[batch, objectives]`; given: bool `[batch, objectives]`.
    """
    x, y = masked(predictions.double(), given), masked(scores.double(), given)
    sums = {"n": given, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "errors": (x - y).square()}
    totals = {name: values.sum(0) for name, values in sums.items()}
    return {f"{one}/{name}": total[k] for name, total in totals.items() for k, one in enumerate(objectives)}


def objective_metrics(sums: dict[str, float], objectives: Sequence[str]) -> dict[str, Any]:
    """From the sums of `objective_sums`: the loss; of each objective that has scores the mean squared error, Pearson's
    correlation (where both vary) and the number of scores."""
    by_objective = {
        one: {name: sums[f"{one}/{name}"] for name in ("n", "x", "y", "xx", "yy", "xy", "errors")} for one in objectives
    }
    count = sum(of_one["n"] for of_one in by_objective.values())
    errors = sum(of_one["errors"] for of_one in by_objective.values())
    metrics = {"loss": errors / count if count else float("nan")}
    for one, of_one in by_objective.items():
        if of_one["n"] == 0:
            continue
        squared = of_one.pop("errors")
        metrics |= {f"mse/{one}": squared / of_one["n"], f"scores/{one}": of_one["n"]}
        if (found := correlation(**of_one)) is not None:
            metrics[f"correlation/{one}"] = found
    return metrics


def in_words(objectives: Sequence[str], scores: Sequence[float]) -> str:
    """Scores by objective, without those that there are not."""
    return ", ".join(f"{one} {score:.4g}" for one, score in zip(objectives, scores, strict=True) if score == score)
