"""What SFT, reward modelling and preference optimisation share: rows in, a loss over the global batch out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.base import BaseModel
from coati.trainers.base import LossPart, Trainer


class SupervisedTrainer(Trainer):
    """One model, one dataset, one loss.

    An algorithm gives `kind`, `model_class`, `collate`, `count` and `loss`, and `tally`, `averages` and `samples` for
    evaluation.
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

    def longest_sequence(self):
        return max(int(data.lengths.max()) for data in (self.data, self.eval_data) if data is not None)

    def collate(self, samples: list) -> Any:
        """A batch from samples."""
        raise NotImplementedError

    def count(self, batch) -> Tensor:
        """What the loss is divided by, of this batch."""
        raise NotImplementedError

    def loss(self, batch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the loss and of the metrics."""
        raise NotImplementedError

    def tally(self, output, batch, rows: Tensor) -> dict[str, Tensor]:
        """What is measured, summed over some of the batch's rows (bool `[batch]`, for pairs `[pairs]`)."""
        raise NotImplementedError

    def averages(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from the sums of `tally`."""
        raise NotImplementedError

    def scores(self, output, batch, rows: Tensor) -> list:
        """What `samples` wants to know of each of these rows, if anything."""
        return []

    def samples(self, scores: dict[int, Any]) -> list[dict[str, Any]]:
        """Texts of the first evaluation rows, whose `scores` are given by row."""
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

    def parts_of(self, data) -> tuple[Sequence[str], Any]:
        """Names of the parts of evaluation data that are also measured alone, and of which each row is (`[rows]`)."""
        return data.source_names, data.source_of_row

    @torch.no_grad()
    def evaluate(self):
        """Metrics of the evaluation data and, as `METRIC/NAME`, of each of its parts if there are several; samples."""
        if self.eval_data is None:
            return {}, []
        names, part_of_row = self.parts_of(self.eval_data)
        tallies: list[list[dict[str, Tensor]]] = [[] for _ in names]
        scores: dict[int, Any] = {}
        for output, batch, real, rows in self.eval_outputs():
            parts = torch.as_tensor(part_of_row[rows], device=real.device)
            for k, tally in enumerate(tallies):
                tally.append(self.tally(output, batch, real & (parts == k)))
            numbers = [row for row, is_real in zip(rows, real.tolist(), strict=True) if is_real]
            scores |= zip(numbers, self.scores(output, batch, real), strict=False)
        found = [self.communicator.sum_metrics(tally) for tally in tallies]
        metrics = self.averages({name: sum(sums[name] for sums in found) for name in found[0]})
        for k, name in enumerate(names) if len(names) > 1 else ():
            if (part_of_row == k).any():
                metrics |= {f"{metric}/{name}": value for metric, value in self.averages(found[k]).items()}
        first = self.communicator.gather([pair for pair in scores.items() if pair[0] < self.config.samples])
        samples = self.samples(dict(sorted(pair for part in first for pair in part))) if self.config.samples else []
        return metrics, samples

    def eval_outputs(self) -> Iterator[tuple[Any, Any, Tensor, list[int]]]:
        """The model's outputs for this rank's share of the evaluation data: output, batch, which of its rows are real
        (bool `[batch]`), the numbers of all its rows. Batches are filled up as in `share_of`.
        """
        chunks = self.share_of(self.eval_data)
        numbers = [[row for row, _ in chunk] for chunk in chunks]
        batches = self.load_all(self.eval_data, numbers, range(len(self.eval_data)))
        engine = self.engines["model"]
        engine.model.eval()
        outputs = engine.forward_all([self.inputs(batch, self.targets(batch)) for batch in batches])
        engine.model.train()
        for output, batch, chunk, rows in zip(outputs, batches, chunks, numbers, strict=True):
            yield output, batch, torch.tensor([real for _, real in chunk], device=self.runtime.device), rows
