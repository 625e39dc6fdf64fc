"""What SFT, reward modeling and preference optimization share: rows in, a loss over the global batch out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.base import BaseModel
from coati.run_layout import ONLY_MODEL
from coati.trainers.batching import Batching, model_inputs
from coati.trainers.trainer import Trainer
from coati.transfer import upload


class SupervisedTrainer(Trainer):
    """One model, one data set, one loss.

    An algorithm gives `kind`, `model_class`, `collate`, `count` and `loss`, and for evaluation `accumulate`, `finalize`
    and `samples`.

    Attributes:
        kind: of the data's rows.
        rows_per_sample: what the model reads of a sample; 2 for pairs.
        generates: whether the model writes sample responses.
        model: the engine of the model; data, eval_data: the rows; order: those of each step.
    """

    kind: str
    model_class: type[BaseModel]
    rows_per_sample = 1
    generates = False

    def build(self):
        c = self.config
        self.data = self.load_data(c.data.train_data, c.data.train_weights)
        self.eval_data = self.load_data(c.data.eval_data, part_column=c.evaluation.eval_column)
        self.order, self.total_steps = self.make_order()
        budget = c.max_tokens_per_batch and c.max_tokens_per_batch // self.rows_per_sample
        self.batching = Batching(self.ranks, c.micro_batch_size, budget, c.model.padding_free)
        self.factory.longest_sequence = self.longest_sequence()
        start = self.folder.model_in_checkpoint(ONLY_MODEL) or c.model.path
        accumulates = c.batch_size // self.ranks.world_size > c.micro_batch_size
        self.model = self.factory.trained(self.make_model(start), accumulates=accumulates, generates=self.generates)
        self.engines = {ONLY_MODEL: self.model}

    def load_data(self, sources: list[str], weights: list[float] | None = None, part_column: str | None = None):
        """The rows of some sources, with `lengths`, `part_names`, `part_of_row` and `key`; None for no sources.

        Args:
            part_column: the field of the rows that names their parts, if that isn't their source.
        """
        return self.factory.dataset(sources, self.kind, weights, part_column=part_column)

    def make_order(self):
        """The order of the training data (its `batch(k)` and `epoch(k)`), and how many steps the run has."""
        return self.factory.order(self.data, self.start)

    def make_model(self, start) -> BaseModel:
        """The model that is trained, from a folder."""
        return self.factory.model(self.model_class, start, lora=self.config.model.lora)

    def longest_sequence(self) -> int:
        """The most tokens of a row that the model reads."""
        return max(int(data.lengths.max()) for data in (self.data, self.eval_data) if data is not None)

    # --- for the algorithm to fill in

    def collate(self, samples: list) -> Any:
        """A batch from samples."""
        raise NotImplementedError

    def count(self, batch) -> Tensor | int:
        """What the loss is divided by, of this batch."""
        raise NotImplementedError

    def loss(self, output, batch, denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's part of the loss and of the metrics."""
        raise NotImplementedError

    def accumulate(self, output, batch, rows: Tensor) -> dict[str, Tensor]:
        """What is measured, summed over some of the batch's rows (bool `[batch]`, for pairs `[pairs]`)."""
        raise NotImplementedError

    def finalize(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics from the sums of `accumulate`."""
        raise NotImplementedError

    def row_scores(self, output, batch, rows: Tensor) -> list:
        """What `samples` wants to know of each of these rows, if anything."""
        return []

    def samples(self, row_scores: dict[int, Any]) -> list[dict[str, Any]]:
        """Texts of the first evaluation rows, whose `row_scores` are given by row."""
        raise NotImplementedError

    def targets(self, batch) -> Tensor | None:
        """The tokens whose log-probs the loss reads, bool `[batch, seq]`; None if it reads something else."""
        return None

    # --- training

    def step(self, k):
        rows = self.order.batch(k)
        micro_batches = self.load_all(self.data, self.batching.shard(rows, self.data.lengths), rows)
        rate = self.learning_rate(k, self.config.optimizer.learning_rate)
        with self.model.update(rate) as update:
            update.add(micro_batches, self.inputs, self.loss, self.count)
        return {**update.metrics, "learning_rate": rate, "epoch": self.order.epoch(k + 1), "tokens": update.tokens}

    def inputs(self, batch) -> dict[str, Any]:
        """What the model is called with."""
        return model_inputs(batch, self.targets(batch))

    def load(self, data, index: Sequence[int]):
        """The rows as a batch on this rank's device."""
        return self.collate([data[i] for i in index]).to(self.runtime.device)

    def load_all(self, data, chunks: list[list[int]], rows: Sequence[int]) -> list:
        """This rank's micro-batches of the `rows` that all ranks see together."""
        return [self.load(data, chunk) for chunk in chunks]

    # --- evaluation

    def parts_of(self, data) -> tuple[Sequence[str], Any]:
        """Names of the parts of evaluation data that are also measured alone, and of which each row is (`[rows]`), -1
        for none."""
        return data.part_names, data.part_of_row

    @torch.no_grad()
    def evaluate(self):
        """Metrics of the evaluation data and, as `METRIC/NAME`, of each of its parts if there are several; samples."""
        if self.eval_data is None:
            return {}, []
        names, part_of_row = self.parts_of(self.eval_data)
        sums: dict[int, list[dict[str, Tensor]]] = {part: [] for part in sorted(set(part_of_row.tolist()))}
        row_scores: dict[int, Any] = {}
        for output, batch, real, rows in self.eval_outputs():
            parts = upload(part_of_row[rows], real.device)
            for part in sums:
                sums[part].append(self.accumulate(output, batch, real & (parts == part)))
            numbers = [row for row, is_real in zip(rows, real.tolist(), strict=True) if is_real]
            row_scores |= zip(numbers, self.row_scores(output, batch, real), strict=False)
        found = {part: self.ranks.sum_metrics(of_part) for part, of_part in sums.items()}
        measured = next(iter(found.values()))
        metrics = self.finalize({name: sum(of_part[name] for of_part in found.values()) for name in measured})
        if len(found) > 1:
            for part, of_part in found.items():
                if part >= 0:
                    metrics |= {f"{metric}/{names[part]}": value for metric, value in self.finalize(of_part).items()}
        return metrics, self.first_samples(row_scores)

    def first_samples(self, row_scores: dict[int, Any]) -> list[dict[str, Any]]:
        """The samples of the first rows, whichever ranks have seen them."""
        if self.config.evaluation.samples == 0:
            return []
        first = [pair for pair in row_scores.items() if pair[0] < self.config.evaluation.samples]
        return self.samples(dict(sorted(pair for of_rank in self.ranks.gather(first) for pair in of_rank)))

    def eval_outputs(self) -> Iterator[tuple[Any, Any, Tensor, list[int]]]:
        """The model's outputs for this rank's share of the evaluation data: output, batch, which of its rows are real
        (bool `[batch]`), the numbers of all its rows; see `Batching.shard_all`.
        """
        chunks = self.batching.shard_all(self.eval_data.lengths)
        numbers = [[row for row, _ in chunk] for chunk in chunks]
        batches = self.load_all(self.eval_data, numbers, range(len(self.eval_data)))
        self.model.model.eval()
        outputs = self.model.forward_all([self.inputs(batch) for batch in batches])
        self.model.model.train()
        for output, batch, chunk, rows in zip(outputs, batches, chunks, numbers, strict=True):
            yield output, batch, upload([real for _, real in chunk], self.runtime.device, torch.bool), rows
