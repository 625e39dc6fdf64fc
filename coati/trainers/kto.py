"""KTO: a policy learns from responses that are good or bad, without pairs (Ethayarajh et al., 2402.01306).

One step:
    1. the reference's log-probs of the batch's responses (`preference.py`)
    2. the KL of the policy to the reference, from responses to prompts that they do not belong to
    3. the policy's log-probs, and the loss

Departure from the paper: the responses of step 2 are those of rows half a batch on, in the data's order. So the step
depends neither on how the batch is split over ranks nor on the order of its rows, and the two responses of one prompt,
which are neighbors, do not meet.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coati.data import collate_sft, collate_unpaired, mismatched_sequence
from coati.losses import kto_loss
from coati.losses.masking import masked
from coati.losses.preference import Responses
from coati.trainers.pairs import text_of
from coati.trainers.preference import PreferenceTrainer
from coati.trainers.reference import response_sums
from coati.transfer import upload


class KTOTrainer(PreferenceTrainer):
    """Trains an `Actor` on responses that are good or bad."""

    kind = "unpaired"
    best_metric = ("loss", False)

    def build(self):
        super().build()
        self.reference = self.make_reference()

    def longest_sequence(self):
        """Other rows' responses are put to each prompt."""
        return self.config.data.max_length

    def collate(self, samples):
        return collate_unpaired(samples, self.factory.pad_id)

    def count(self, batch):
        return len(batch.desirable)

    def step(self, k):
        return means_by_label(super().step(k))

    def loss(self, log_probs, batch, denominator):
        return self.loss_of(self.responses(log_probs, batch), batch.desirable, batch.kl, denominator)

    def loss_of(self, responses: Responses, desirable: Tensor, kl: Tensor, denominator: float):
        """The loss of responses, and its metrics."""
        a = self.config.algorithm
        weights = dict(desirable_weight=a.desirable_weight, undesirable_weight=a.undesirable_weight)
        return kto_loss(responses, desirable, kl, denominator, beta=a.beta, **weights)

    def load_all(self, data, chunks, rows):
        kl = self.mismatched_kl(data, sorted(rows))
        return [replace(batch, kl=kl) for batch in super().load_all(data, chunks, rows)]

    def mismatched_kl(self, data, rows: Sequence[int]) -> Tensor:
        """The mean log-ratio of the rows' responses to other rows' prompts, over all ranks: a number."""
        sequences, n = [data[row].sequence for row in rows], len(rows)
        mixed = [
            mismatched_sequence(asked, sequences[(i + n // 2) % n], self.tokenizer, self.config.data.max_length)
            for i, asked in enumerate(sequences)
        ]
        chunks = self.batching.shard_all([len(sequence) for sequence in mixed])
        batches = [
            collate_sft([mixed[i] for i, _ in chunk], self.factory.pad_id).to(self.runtime.device) for chunk in chunks
        ]
        policy = response_sums(self.model, batches, self.inputs)
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for chunk, ours, theirs in zip(chunks, policy, self.reference.sums_of(batches), strict=True):
            real = upload([is_real for _, is_real in chunk], self.runtime.device, torch.bool)
            total += masked(ours - theirs, real).sum()
        return self.ranks.sum(total) / n

    def accumulate(self, log_probs, batch, rows):
        responses = self.responses(log_probs, batch).rows(rows)
        return {**self.loss_of(responses, batch.desirable[rows], batch.kl, 1.0)[1], "responses": rows.sum()}

    def finalize(self, sums):
        count = sums["responses"]
        return means_by_label({name: total / count for name, total in sums.items()}) | {"responses": count}

    def row_scores(self, log_probs, batch, rows):
        responses = self.responses(log_probs, batch).rows(rows)
        return (self.config.algorithm.beta * responses.log_ratios).tolist()

    def samples(self, row_scores):
        rows = [(self.eval_data[i], reward) for i, reward in row_scores.items()]
        return [text_of(self.tokenizer, r.sequence) | {"reward": reward, "label": r.desirable} for r, reward in rows]


def means_by_label(metrics: dict[str, float]) -> dict[str, float]:
    """Means over the good and over the bad responses, where there are any, in place of parts of all responses."""
    good = metrics["desirable"]
    for label, part in (("desirable", good), ("undesirable", 1 - good)):
        for name in (f"reward_{label}", f"log_probs_{label}"):
            total = metrics.pop(name)
            if part > 1e-6:
                metrics[name] = total / part
    if 1e-6 < good < 1 - 1e-6:
        metrics["margin"] = metrics["reward_desirable"] - metrics["reward_undesirable"]
    return metrics
