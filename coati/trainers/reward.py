"""Reward modeling: a score for a whole response, learned from pairs (InstructGPT, 2203.02155, section 3.2, eq. 1).

    loss = - mean over pairs of log sigmoid(r(prompt, chosen) - r(prompt, rejected))

Both responses of a pair go through the model in one forward pass; with `share_prompts` what they begin with does once.
Pairs of which neither response is better are learned with the probability that Rao and Kupper (1967) give to ties, if
`tie_theta` is above 1. Scores of several objectives are learned in `objectives.py`.
"""

from coati.data import collate_preference
from coati.losses import confidence_gaps, pairwise_reward_loss
from coati.losses.reward import CONFIDENCE_GAPS
from coati.models import RewardModel
from coati.trainers.config import RewardConfig
from coati.trainers.pairs import check_shared_prompts, finalize_pairs, pair_samples, pair_scores, sharing_prompts
from coati.trainers.supervised import SupervisedTrainer

OF_CALIBRATION = {*CONFIDENCE_GAPS, "decided"}


def reward_trainer(config: RewardConfig, runtime, **options) -> SupervisedTrainer:
    """The trainer of pairs, or of scores if there are objectives."""
    from coati.trainers.objectives import ObjectiveTrainer

    kind = ObjectiveTrainer if config.algorithm.objectives else RewardTrainer
    return kind(config, runtime, **options)


class RewardTrainer(SupervisedTrainer):
    """Trains a `RewardModel` on pairs."""

    config: RewardConfig
    algorithm, model_class = "reward", RewardModel
    best_metric = ("accuracy", True)
    rows_per_sample = 2

    @property
    def kind(self) -> str:
        """Ties are a mistake in the data unless they have a probability."""
        return "comparison" if self.config.algorithm.tie_theta > 1 else "preference"

    def build(self):
        super().build()
        if self.config.algorithm.share_prompts:
            check_shared_prompts(self, pairs=16)  # of two numbers each

    def inputs(self, batch):
        return super().inputs(batch) | sharing_prompts(self.config)

    def collate(self, samples):
        return collate_preference(samples, self.factory.pad_id)

    def count(self, batch):
        return len(batch.margin)

    def loss(self, rewards, batch, denominator):
        a, (chosen, rejected) = self.config.algorithm, rewards.chunk(2)
        margin = batch.margin if a.use_margin else None
        options = dict(margin=margin, label_smoothing=a.label_smoothing, centering=a.centering)
        options |= dict(tie=batch.tie, tie_theta=a.tie_theta)
        return pairwise_reward_loss(chosen, rejected, denominator, **options)

    def accumulate(self, rewards, batch, rows):
        chosen, rejected = rewards.chunk(2)
        theta = self.config.algorithm.tie_theta
        measured = pairwise_reward_loss(chosen[rows], rejected[rows], 1.0, tie=batch.tie[rows], tie_theta=theta)[1]
        decided = rows & ~batch.tie
        gaps = confidence_gaps((chosen - rejected)[decided].float(), theta)
        return measured | gaps | {"pairs": rows.sum(), "decided": decided.sum()}

    def finalize(self, sums):
        gap = sum(abs(sums[name]) for name in CONFIDENCE_GAPS)
        metrics = finalize_pairs({name: total for name, total in sums.items() if name not in OF_CALIBRATION})
        return metrics | {"calibration_error": gap / sums["decided"] if sums["decided"] else float("nan")}

    def row_scores(self, rewards, batch, rows):
        chosen, rejected = rewards.chunk(2)
        return pair_scores(chosen[rows], rejected[rows])

    def samples(self, row_scores):
        return pair_samples(self.tokenizer, self.eval_data, row_scores)
