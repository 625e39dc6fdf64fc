"""Reward modelling: a score for a whole answer, learnt from pairs (InstructGPT, 2203.02155, section 3.2, eq. 1).

    loss = - mean over pairs of log sigmoid(r(prompt, chosen) - r(prompt, rejected))

Both answers of a pair go through the model in one forward pass.
"""

import torch

from coati.data import collate_preference
from coati.losses import pairwise_reward_loss
from coati.models import RewardModel
from coati.rollout.prompts import response_texts
from coati.trainers.config import RewardConfig
from coati.trainers.supervised import SupervisedTrainer


class RewardTrainer(SupervisedTrainer):
    """Trains a `RewardModel` on pairs."""

    config: RewardConfig
    algorithm, kind, model_class = "reward", "preference", RewardModel
    headline = ("accuracy", True)
    rows_per_sample = 2

    def collate(self, samples):
        return collate_preference(samples, self.pad_id)

    def count(self, batch):
        return torch.tensor(len(batch.margin))

    def loss(self, rewards, batch, denominator):
        chosen, rejected = rewards.chunk(2)
        c = self.config
        margin = batch.margin if c.use_margin else None
        options = dict(margin=margin, label_smoothing=c.label_smoothing, centering=c.centering)
        return pairwise_reward_loss(chosen, rejected, denominator, **options)

    def judge(self, rewards, batch, rows):
        """Rewards of the chosen and of the rejected answers of these pairs, and the sums of their metrics."""
        chosen, rejected = (r[rows] for r in rewards.chunk(2))
        return chosen, rejected, pairwise_reward_loss(chosen, rejected, 1.0)[1]

    def tally(self, output, batch, rows):
        return {**self.judge(output, batch, rows)[2], "pairs": rows.sum()}

    def averages(self, sums):
        """Accuracy with its 95 % interval, and the means of the others."""
        pairs = sums["pairs"]
        metrics = {name: total / pairs for name, total in sums.items()}
        low, high = wilson_interval(metrics["accuracy"], pairs)
        return metrics | {"accuracy_low": low, "accuracy_high": high, "pairs": pairs}

    def scores(self, output, batch, rows):
        chosen, rejected, _ = self.judge(output, batch, rows)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def samples(self, scores):
        """Two rows a pair."""
        samples = []
        for row, rewards in scores.items():
            for side, reward in zip(("chosen", "rejected"), rewards, strict=True):
                text = self.text_of(getattr(self.eval_data[row], side))
                samples.append(text | {"reward": reward, "side": side})
        return samples

    def text_of(self, sequence) -> dict[str, str]:
        start = sequence.loss_mask.index(True)
        [response] = response_texts(self.tokenizer, [sequence.input_ids[start:]])
        return {"prompt": self.tokenizer.decode(sequence.input_ids[:start]), "response": response.strip()}


def wilson_interval(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share seen in n trials (Wilson 1927), which stays within 0 and 1."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half
