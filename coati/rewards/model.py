"""A reward model that shares the policy's tokenizer: it reads the samples' tokens, so nothing is tokenized twice."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coati.rewards.base import Reward
from coati.samples import Sample
from coati.transfer import to_device


class ModelReward(Reward):
    """Scores with a `coati.models.RewardModel`, or an `ObjectiveRewardModel`.

    Args:
        forward_all: gives the rewards `[batch]` or `[batch, objectives]` of each of several micro-batches, which are
            keywords of the model's forward (`Engine.forward_all`).
        split: from the rows' lengths to the rows of each forward pass.
    """

    def __init__(
        self,
        forward_all: Callable[[Sequence[dict]], list[Tensor]],
        pad_id: int,
        device: torch.device,
        split: Callable[[list[int]], list[list[int]]],
        name: str = "reward_model",
    ):
        self.forward_all, self.pad_id, self.device, self.split, self.name = forward_all, pad_id, device, split, name

    @torch.no_grad()
    def score(self, samples):
        """Rewards of whole sequences (prompt and response), `[batch]` or `[batch, objectives]`."""
        parts = self.split([len(sample.tokens) for sample in samples])
        batches = [right_padded([samples[i] for i in part], self.pad_id, self.device) for part in parts]
        found = torch.cat(self.forward_all(batches)).float().cpu()  # one copy to the host, for which it waits
        scores = torch.empty_like(found)
        scores[[i for part in parts for i in part]] = found
        return scores


def right_padded(samples: Sequence[Sample], pad_id: int, device: torch.device) -> dict:
    """A micro-batch of them, as keywords of a model's forward."""
    ids, mask = pad_right(samples, pad_id, device)
    return {"input_ids": ids, "attention_mask": mask, "right_padded": True}


def pad_right(samples: Sequence[Sample], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Their tokens, int64 `[batch, seq]`, and which of them are no padding, bool `[batch, seq]`."""
    rows = [torch.tensor(sample.tokens) for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return to_device(ids, device), to_device(mask, device)
