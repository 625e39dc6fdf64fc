"""What SFT, reward modelling and preference optimisation share: rows in, a loss over the global batch out."""

from collections.abc import Iterator, Sequence
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
        rows = self.batches.batch(step)
        micro_batches = self.load_all(self.data, self.deal(rows, self.data.lengths), rows)
        rate = self.learning_rate(self.config.learning_rate)
        part = LossPart(micro_batches, self.count, self.loss, targets=self.targets)
        metrics = self.optimise(self.engines["model"], [part], rate)
        tokens = self.communicator.sum(sum(int(b.attention_mask.sum()) for b in micro_batches))
        return {**metrics, "learning_rate": rate, "epoch": self.batches.epoch(step + 1)}, int(tokens)

    def load(self, data, index: list[int]):
        """The rows as a batch on this rank's device."""
        return self.collate([data[i] for i in index]).to(self.runtime.device)

    def load_all(self, data, chunks: list[list[int]], rows: Sequence[int]) -> list:
        """This rank's micro-batches of the `rows` that all ranks see together."""
        return [self.load(data, chunk) for chunk in chunks]

    def share_of(self, data) -> list[list[tuple[int, bool]]]:
        """This rank's micro-batches of all rows: their numbers, and whether they are real.

        Every rank gets the same number of batches, for plugins that communicate in the forward pass; missing rows are
        filled with copies that are not real.
        """
        rows, lengths = len(data), list(data.lengths)
        filler = -rows % self.communicator.world_size
        copied = lengths.index(max(lengths))
        chunks = self.deal(range(rows + filler), lengths + [max(lengths)] * filler)
        return [[(i, True) if i < rows else (copied, False) for i in chunk] for chunk in chunks]

    @torch.no_grad()
    def eval_outputs(self) -> Iterator[tuple[Any, Any, Tensor, list[int]]]:
        """The model's outputs for this rank's share of the evaluation data: output, batch, which of its rows are real
        (bool `[batch]`), their numbers. Batches are filled up as in `share_of`.
        """
        chunks = self.share_of(self.eval_data)
        numbers = [[row for row, _ in chunk] for chunk in chunks]
        batches = self.load_all(self.eval_data, numbers, range(len(self.eval_data)))
        engine = self.engines["model"]
        engine.model.eval()
        outputs = engine.forward_all([self.inputs(batch, self.targets(batch)) for batch in batches])
        engine.model.train()
        for output, batch, chunk in zip(outputs, batches, chunks, strict=True):
            real = torch.tensor([real for _, real in chunk], device=self.runtime.device)
            yield output, batch, real, [row for row, real in chunk if real]
