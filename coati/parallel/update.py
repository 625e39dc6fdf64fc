"""One optimizer step, put together from the terms of its loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.errors import UserError


class SkippedSteps(UserError):
    """Too many steps in a row had a loss or a gradient that isn't finite."""


@dataclass(frozen=True)
class Task:
    """One micro-batch of a step.

    Attributes:
        inputs: keywords of the model's forward.
        loss: of the model's output, the part of the global loss and of its metrics.
    """

    inputs: dict[str, Any]
    loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Term:
    """What `Update.add` was given."""

    micro_batches: Sequence[Any]
    inputs: Callable[[Any], dict[str, Any]]
    loss: Callable[[Any, Any, float], tuple[Tensor, dict[str, Tensor]]]
    count: Callable[[Any], Tensor | int]


class Update:
    """A step of one engine. Every term is divided by its own count over all micro-batches and ranks, so the step
    depends neither on how rows are split into micro-batches nor on the number of ranks.

    Attributes:
        metrics: once the step is done, those of the losses, the gradients' norm before clipping (`grad_norm`), the
            fraction of padding in what the model read (`padding_share`), and how evenly it used its experts.
        tokens: that the model read on all ranks, without padding.
    """

    def __init__(self):
        self.terms: list[Term] = []
        self.metrics: dict[str, float] = {}
        self.tokens = 0.0

    def add(
        self,
        micro_batches: Sequence[Any],
        inputs: Callable[[Any], dict[str, Any]],
        loss: Callable[[Any, Any, float], tuple[Tensor, dict[str, Tensor]]],
        count: Callable[[Any], Tensor | int],
    ):
        """Adds a term of the loss.

        Args:
            micro_batches: this rank's.
            inputs: keywords of the model's forward, given a micro-batch.
            loss: a micro-batch's part of the global term and of its metrics, given the model's output, the micro-batch
                and the global count.
            count: what the term is divided by (tokens, pairs, ...), of one micro-batch.
        """
        self.terms.append(Term(micro_batches, inputs, loss, count))

    def finish(self, engine, learning_rate: float):
        """Forward, backward and the step; sets `metrics` and `tokens`."""
        ranks, tasks = engine.data_ranks, []
        for term in self.terms:
            total = sum(torch.as_tensor(term.count(batch)) for batch in term.micro_batches)
            denominator = max(ranks.sum(float(total)).item(), 1.0)
            for batch in term.micro_batches:
                tasks.append(Task(term.inputs(batch), _part(term, batch, denominator)))
        masks = [task.inputs["attention_mask"] for task in tasks]
        tokens = sum(mask.sum() for mask in masks)
        read = {"tokens": tokens, "columns": tokens if engine.module.padding_free else sum(map(Tensor.numel, masks))}
        if engine.expert_load.coefficient:
            engine.expert_load.tokens = max(ranks.sum(float(read["tokens"])).item(), 1.0)
        metrics = ranks.sum_metrics([*engine.accumulate(tasks), read])
        self.tokens = metrics.pop("tokens")
        metrics["padding_share"] = 1 - self.tokens / metrics.pop("columns")
        metrics |= engine.expert_load.metrics(engine.runtime.communicator)
        bad = [name for name in metrics if "loss" in name and not math.isfinite(metrics[name])]
        norm = engine.step(learning_rate, finite=not bad)
        if norm is None and engine.skipped_in_a_row >= engine.config.max_skipped_steps:
            reason = f"{bad[0]} is {metrics[bad[0]]}" if bad else "the gradient is not finite"
            raise SkippedSteps(
                f"{reason}, skipped {engine.skipped_in_a_row} steps in a row (--max_skipped_steps "
                f"{engine.config.max_skipped_steps}): lower the learning rate or use a wider precision"
            )
        self.metrics = {**metrics, "grad_norm": math.nan if norm is None else norm}


def _part(term: Term, batch: Any, denominator: float) -> Callable[[Any], tuple[Tensor, dict[str, Tensor]]]:
    """A micro-batch's part of a term, given the model's output."""
    return lambda output: term.loss(output, batch, denominator)
