"""What SFT and reward modelling share: rows in, a loss over the global batch out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coati.models.base import BaseModel
from coati.trainers.base import LossPart, Trainer


class SupervisedTrainer(Trainer):
    """One model, one dataset, one loss.

    An algorithm gives `kind`, `model_class`, `collate`, `count`, `loss` and `score_rows`.
    """

    kind: str
    model_class: type[BaseModel]
    generates = False

    def build(self):
        c = self.config
        self.data = self.dataset(c.train_data, self.kind, c.train_weights)
        self.eval_data = self.dataset(c.eval_data, self.kind)
        self.batches = self.sampler(self.data)
        model = self.model(self.model_class, self.source("model") or c.model, lora=c.lora)
        rows = c.batch_size // self.communicator.world_size
        accumulates = rows > c.micro_batch_size
        self.engines = {"model": self.engine(model, accumulates=accumulates, generates=self.generates)}

    def collate(self, samples: list) -> Any:
        """A batch from samples."""
        raise NotImplementedError

    def count(self, batch) -> Tensor:
        """What the loss is divided by, of this batch."""
        raise NotImplementedError

    def loss(self, batch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the loss and of the metrics."""
        raise NotImplementedError

    def targets(self, batch) -> Tensor | None:
        """The tokens whose log-probs the loss reads; None if it reads something else."""
        return None

    def train_step(self, step: int) -> tuple[dict[str, float], int]:
        dealt = self.deal(self.batches.batch(step), self.data.lengths)
        micro_batches = [self.load(self.data, index) for index in dealt]
        rate = self.learning_rate(self.config.learning_rate)
        part = LossPart(micro_batches, self.count, self.loss, targets=self.targets)
        metrics = self.optimise(self.engines["model"], [part], rate)
        tokens = self.communicator.sum(sum(int(b.attention_mask.sum()) for b in micro_batches))
        return {**metrics, "learning_rate": rate, "epoch": self.batches.epoch(step + 1)}, int(tokens)

    def load(self, data, index: list[int]):
        """The rows as a batch on this rank's device."""
        return self.collate([data[i] for i in index]).to(self.runtime.device)

    @torch.no_grad()
    def eval_outputs(self) -> Iterator[tuple[Any, Any, Tensor, list[int]]]:
        """The model's outputs for this rank's share of the evaluation data: output, batch, which of its rows are real
        (bool `[batch]`), their numbers.

        Every rank gets the same number of batches, for plugins that communicate in the forward pass; missing rows are
        filled with copies that are not real.
        """
        rows, lengths = len(self.eval_data), list(self.eval_data.lengths)
        filler = -rows % self.communicator.world_size
        chunks = self.deal(range(rows + filler), lengths + [max(lengths)] * filler)
        copied = lengths.index(max(lengths))
        batches = [self.load(self.eval_data, [i if i < rows else copied for i in chunk]) for chunk in chunks]
        engine = self.engines["model"]
        engine.model.eval()
        outputs = engine.forward_all([self.inputs(batch, self.targets(batch)) for batch in batches])
        engine.model.train()
        for output, batch, chunk in zip(outputs, batches, chunks, strict=True):
            real = torch.tensor([i < rows for i in chunk], device=self.runtime.device)
            yield output, batch, real, [i for i in chunk if i < rows]
