"""A process reward model that shares the policy's tokenizer: it scores the steps of a response where they end among the
sampled tokens."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from coati.models import ObjectiveRewardModel, ProcessRewardModel, RewardModel
from coati.models.objectives import objective_weights
from coati.models.process_reward_model import stored_separator
from coati.rewards.base import Reward
from coati.rewards.config import ModelRewardSettings, ProcessRewardSettings
from coati.rewards.model import ModelReward, right_padded
from coati.rewards.objectives import ObjectivesReward
from coati.samples import Sample
from coati.steps import decode_with_starts, last_tokens, step_ends
from coati.transfer import upload

REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda steps: steps[-1],
    "mean": lambda steps: sum(steps) / len(steps),
}


class ProcessReward(Reward):
    """Scores with a `coati.models.ProcessRewardModel`. A response without a step gets 0.

    Args:
        forward_all, pad_id, device, split: as `ModelReward`; the former gives logits `[batch, seq]`.
        tokenizer: the policy's.
        separator: what stands between steps.
        reduce: what a response's score is of its steps' probabilities: their min (Math-Shepherd, 2312.08935, section
            3.4), product (2305.20050, section 2.6), mean, or the last one; none for rewards of tokens, each step's
            probability at its last token.
    """

    def __init__(
        self,
        forward_all: Callable[[Sequence[dict]], list[Tensor]],
        pad_id: int,
        device: torch.device,
        split: Callable[[list[int]], list[list[int]]],
        *,
        tokenizer: Any,
        separator: str,
        reduce: str,
        name: str = "process",
    ):
        self.forward_all, self.pad_id, self.device, self.split, self.name = forward_all, pad_id, device, split, name
        self.tokenizer, self.separator, self.reduce = tokenizer, separator, reduce
        self.on_tokens = reduce == "none"

    def score(self, samples):
        """A number per response, or with `reduce` none a number per token of each."""
        ends = [steps_of(sample, self.tokenizer, self.separator) for sample in samples]
        steps = self.probabilities(samples, ends)
        if self.on_tokens:
            return [on_tokens(sample, *row) for sample, *row in zip(samples, ends, steps, strict=True)]
        return [REDUCTIONS[self.reduce](row) if row else 0.0 for row in steps]

    @torch.no_grad()
    def probabilities(self, samples: Sequence[Sample], ends: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each step how likely it is right, where steps end with these tokens of their samples."""
        parts = self.split([len(sample.tokens) for sample in samples])
        batches = [right_padded([samples[i] for i in part], self.pad_id, self.device) for part in parts]
        found = []
        for part, logits in zip(parts, self.forward_all(batches), strict=True):
            rows = [row for row, i in enumerate(part) for _ in ends[i]]
            columns = [column for i in part for column in ends[i]]
            found.append(logits[upload(rows, logits.device), upload(columns, logits.device)])
        numbers = iter(torch.cat(found).float().sigmoid().tolist())  # one copy to the host, for which it waits
        steps: list[list[float]] = [[] for _ in samples]
        for i in (i for part in parts for i in part):
            steps[i] = [next(numbers) for _ in ends[i]]
        return steps


def steps_of(sample: Sample, tokenizer: Any, separator: str) -> list[int]:
    """The last token of each step, as a place in the sample's tokens. What ends a response belongs to no step; in an
    episode every turn is split by itself."""
    special = set(tokenizer.all_special_ids)
    ends = []
    for is_sampled, run in groupby(range(len(sample.tokens)), key=lambda i: sample.response_mask[i]):
        if not is_sampled:
            continue
        places = list(run)
        while places and sample.tokens[places[-1]] in special:
            places.pop()
        text, starts = decode_with_starts([sample.tokens[i] for i in places], tokenizer)
        ends += [places[token] for token in last_tokens(starts, step_ends(text, separator))]
    return list(dict.fromkeys(ends))


def on_tokens(sample: Sample, ends: Sequence[int], steps: Sequence[float]) -> list[float]:
    """A number per token: each step's at its end, 0 elsewhere."""
    of_tokens = [0.0] * len(sample.tokens)
    for place, probability in zip(ends, steps, strict=True):
        of_tokens[place] = probability
    return of_tokens


def load_here(
    folder: str,
    settings: ModelRewardSettings | ProcessRewardSettings | None,
    tokenizer: Any,
    device: torch.device,
    split: Callable[[list[int]], list[list[int]]],
) -> Reward:
    """A reward model, or a process reward model, that is whole in this process.

    Args:
        settings: of the reward; None for a reward model of one score.
        tokenizer: that both the samples and the model have; split: as `ModelReward`.

    Raises:
        UserError: the folder can't be loaded, or has no head; see `objective_weights`.
    """

    def loaded(model_class):
        model = model_class(folder).eval().to(device)
        model.check_head(folder)
        return lambda batches: [model(**batch) for batch in batches]

    pad_id = tokenizer.pad_token_id
    if isinstance(settings, ProcessRewardSettings):
        how = dict(tokenizer=tokenizer, separator=stored_separator(folder), reduce=settings.reduce)
        return ProcessReward(loaded(ProcessRewardModel), pad_id, device, split, **how)
    weights = objective_weights(folder, settings.objectives if settings else None)
    if weights is None:
        return ModelReward(loaded(RewardModel), pad_id, device, split)
    return ObjectivesReward(ModelReward(loaded(ObjectiveRewardModel), pad_id, device, split), weights)
