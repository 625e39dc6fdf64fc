"""Preference optimization on pairs: a policy learns from pairs of responses without a reward model (DPO: Rafailov et
al., 2305.18290; IPO, SimPO, ORPO and the others are named in coati/losses/preference.py).

One step:
    1. the reference's log-probs of both responses of each pair (`preference.py`)
    2. the policy's log-probs, chosen and rejected responses in one forward pass, and the loss
"""

from coati.data import collate_preference
from coati.losses import preference_loss
from coati.losses.preference import PREFERENCE_LOSSES, Options, Responses
from coati.trainers.pairs import check_shared_prompts, finalize_pairs, pair_samples, pair_scores, sharing_prompts
from coati.trainers.preference import PreferenceTrainer, chosen_and_rejected
from coati.trainers.reference import cached_reference


class DPOTrainer(PreferenceTrainer):
    """Trains an `Actor` on pairs, as its own reward model."""

    kind, rows_per_sample = "preference", 2
    best_metric = ("accuracy", True)

    def build(self):
        super().build()
        algorithm = self.config.algorithm
        if algorithm.share_prompts:
            check_shared_prompts(self, pairs=1)  # which has a log-prob for each token
        if algorithm.cache_reference:
            sets = [data for data in (self.data, self.eval_data) if data is not None]
            how = (self.make_reference, self.load, self.batching)
            self.reference = cached_reference(self.config, self.runtime, sets, *how)
        elif algorithm.has_reference:
            self.reference = self.make_reference()

    def inputs(self, batch):
        return super().inputs(batch) | sharing_prompts(self.config)

    def collate(self, samples):
        return collate_preference(samples, self.factory.pad_id)

    def count(self, batch):
        return len(batch.margin)

    def loss(self, log_probs, batch, denominator):
        return self.loss_of(*chosen_and_rejected(self.responses(log_probs, batch)), denominator)

    def loss_of(self, chosen: Responses, rejected: Responses, denominator: float):
        """The loss of pairs, and its metrics."""
        a = self.config.algorithm
        how = dict(nll_coefficient=a.nll_coefficient, length_normalized=a.length_normalized)
        return preference_loss(a.type, chosen, rejected, denominator, options=self.options, **how)

    @property
    def options(self) -> Options:
        a = self.config.algorithm
        return Options(a.beta, a.label_smoothing, a.gamma)

    def accumulate(self, log_probs, batch, rows):
        pairs = chosen_and_rejected(self.responses(log_probs, batch), rows)
        return {**self.loss_of(*pairs, 1.0)[1], "pairs": rows.sum()}

    def finalize(self, sums):
        return finalize_pairs(sums)

    def row_scores(self, log_probs, batch, rows):
        pairs = chosen_and_rejected(self.responses(log_probs, batch), rows)
        read = [side.per_token() for side in pairs] if self.config.algorithm.length_normalized else pairs
        chosen, rejected, _ = PREFERENCE_LOSSES[self.config.algorithm.type](*read, self.options)
        return pair_scores(chosen, rejected)

    def samples(self, row_scores):
        return pair_samples(self.tokenizer, self.eval_data, row_scores)
