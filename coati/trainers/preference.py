"""What DPO, its relatives and KTO share: an `Actor` on responses that are better or worse, and its reference.

One step:
    1. the reference's log-probs of the batch's responses: from a frozen copy of the first policy, from the policy
       without its LoRA adapter, or from a cache; SimPO, ORPO and CPO have no reference
    2. the policy's log-probs, and the loss (`dpo.py`, `kto.py`)

Departure from the papers: dropout is off, so that the policy starts as its reference.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from coati.errors import UserError
from coati.losses import response_targets
from coati.losses.masking import masked
from coati.losses.preference import Responses
from coati.models import Actor
from coati.models.base import disable_dropout
from coati.trainers.config import PreferenceConfig
from coati.trainers.reference import CachedReference, Reference
from coati.trainers.supervised import SupervisedTrainer


def preference_trainer(config: PreferenceConfig, runtime, **options) -> "PreferenceTrainer":
    """The trainer of `config.algorithm`."""
    from coati.trainers.dpo import DPOTrainer
    from coati.trainers.kto import KTOTrainer

    kind = DPOTrainer if config.algorithm.is_paired else KTOTrainer
    return kind(config, runtime, **options)


class PreferenceTrainer(SupervisedTrainer):
    """Trains an `Actor` whose loss compares it with a reference.

    Attributes:
        reference: gives the reference's sums of log-probs; None for a loss without.
    """

    config: PreferenceConfig
    algorithm, model_class = "preference", Actor
    reference: Reference | CachedReference | None = None

    def build(self):
        c = self.config
        if c.model.path is None and c.algorithm.has_reference:
            raise UserError(
                f"{c.algorithm.type} compares with the policy that the run starts from: give --model FOLDER"
            )
        super().build()

    def make_model(self, start):
        model = super().make_model(start)
        disable_dropout(model)
        return model

    def targets(self, batch):
        return response_targets(batch.loss_mask)

    def make_reference(self) -> Reference:
        """A frozen copy of the first policy, or the policy without its adapter."""
        engine = self.factory.frozen_policy(self.config.model.path)
        if engine is not None:
            return Reference(engine, self.inputs)
        return Reference(self.model, lambda batch: self.inputs(batch) | {"adapter": False})

    def load_all(self, data, chunks, rows):
        batches = super().load_all(data, chunks, rows)
        if self.reference is None:
            return batches
        found = self.reference.sums(data, chunks, batches)
        return [replace(batch, reference=sums) for batch, sums in zip(batches, found, strict=True)]

    def responses(self, log_probs: Tensor, batch) -> Responses:
        """What a loss reads of the batch's responses, one per row."""
        targets = self.targets(batch)
        return Responses(masked(log_probs, targets).sum(1), targets.sum(1), batch.reference)


def chosen_and_rejected(responses: Responses, rows: Tensor | slice = slice(None)) -> tuple[Responses, Responses]:
    """The two halves of a batch of pairs, or some pairs of it."""
    references: Sequence[Tensor | None] = (None, None)
    if responses.reference is not None:
        references = responses.reference.chunk(2)
    halves = zip(responses.log_probs.chunk(2), responses.lengths.chunk(2), references, strict=True)
    chosen, rejected = (Responses(s[rows], n[rows], r if r is None else r[rows]) for s, n, r in halves)
    return chosen, rejected
