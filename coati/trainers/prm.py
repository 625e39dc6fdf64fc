"""Process reward modeling: whether each step of a response is right, learned from labels of steps (Let's Verify Step by
Step, 2305.20050; Math-Shepherd, 2312.08935, section 3.3).

    loss = - mean over labeled steps of label log p + (1 - label) log(1 - p)

p is the sigmoid of the head's output at a step's last token. Departure from both papers, which read the probability of
tokens of the vocabulary there: a linear head, as reward models have it.
"""

from typing import Any

from torch import Tensor

from coati.data import collate_stepwise
from coati.intervals import wilson_interval
from coati.losses import first_wrong, step_reward_loss
from coati.models import ProcessRewardModel
from coati.trainers.config import PRMConfig
from coati.trainers.pairs import text_of
from coati.trainers.supervised import SupervisedTrainer


class PRMTrainer(SupervisedTrainer):
    """Trains a `ProcessRewardModel` on labels of steps."""

    config: PRMConfig
    algorithm, kind, model_class = "prm", "stepwise", ProcessRewardModel
    best_metric = ("loss", False)

    def make_model(self, start):
        model = super().make_model(start)
        model.config.step_separator = self.config.data.step_separator
        return model

    def collate(self, samples):
        return collate_stepwise(samples, self.factory.pad_id)

    def count(self, batch):
        return batch.step_mask.sum()

    def loss(self, logits, batch, denominator):
        return step_reward_loss(logits, batch.labels, batch.step_mask, denominator)

    def accumulate(self, logits, batch, rows):
        mask = batch.step_mask & rows[:, None]
        sums = step_reward_loss(logits, batch.labels, mask, 1.0)[1] | {"steps": mask.sum()}
        return sums | found_errors(logits, batch, rows)

    def finalize(self, sums):
        steps = sums["steps"]
        means = {name: sums[name] / steps for name in ("loss", "accuracy", "right", "probability")}
        low, high = wilson_interval(means["accuracy"], steps)
        return means | {"accuracy_low": low, "accuracy_high": high, "steps": steps} | error_metrics(sums)

    def row_scores(self, logits, batch, rows):
        """The steps' probabilities and labels."""
        kept = zip(logits[rows].sigmoid(), batch.labels[rows], batch.step_mask[rows], strict=True)
        return [list(zip(row[mask].tolist(), labels[mask].tolist(), strict=True)) for row, labels, mask in kept]

    def samples(self, row_scores):
        return [
            text_of(self.tokenizer, self.eval_data[row].sequence)
            | {
                "reward": min(probability for probability, _ in steps),
                "steps": " ".join(f"{probability:.2f}" for probability, _ in steps),
                "labels": " ".join(f"{label:.4g}" for _, label in steps),
            }
            for row, steps in row_scores.items()
        ]


def found_errors(logits: Tensor, batch, rows: Tensor) -> dict[str, Tensor]:
    """Of these responses (bool `[batch]`), in how many a step is wrong and in how many of them the first such step is
    found; in how many none is, and in how many of them none is found."""
    said = first_wrong(logits >= 0, batch.step_mask)
    true = first_wrong(batch.labels >= 0.5, batch.step_mask)
    is_correct, found = true == batch.step_mask.shape[1], said == true
    return {
        "erroneous": (rows & ~is_correct).sum(),
        "erroneous_found": (rows & ~is_correct & found).sum(),
        "correct": (rows & is_correct).sum(),
        "correct_found": (rows & is_correct & found).sum(),
    }


def error_metrics(sums: dict[str, float]) -> dict[str, Any]:
    """ProcessBench's accuracies on erroneous and on correct responses, where there are any, and their harmonic mean
    (2412.06559, section 3.1)."""
    shares = {
        f"{kind}_accuracy": sums[f"{kind}_found"] / sums[kind] for kind in ("erroneous", "correct") if sums[kind] > 0
    }
    if len(shares) == 2:
        first, second = shares.values()
        shares["error_f1"] = 2 * first * second / (first + second) if first + second else 0.0
    return shares
