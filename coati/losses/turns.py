"""Credit for turns: in an episode of several turns, what each of the policy's messages led to.

A turn is a run of response tokens one after the other; between two turns stand tokens of the environment. All tokens of
a turn have the same advantage.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from coati.losses.advantages import gae, returns_to_go
from coati.losses.masking import masked


class Turns(NamedTuple):
    """The turns of a batch.

    Attributes:
        mask: bool `[batch, seq]`, True on response tokens; begins: on the first one of each turn.
        number: int64 `[batch, seq]`, of each response token's turn in its row, from 0; 0 elsewhere.
        exists: bool `[batch, turns]`, whether a row has so many.
    """

    mask: Tensor
    begins: Tensor
    number: Tensor
    exists: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Turns":
        """Those of a response mask, `[batch, seq]`."""
        begins = mask.clone()
        begins[:, 1:] &= ~mask[:, :-1]
        counts = begins.sum(1, keepdim=True)
        exists = torch.arange(max(int(counts.max()), 1), device=mask.device) < counts
        return cls(mask, begins, (begins.cumsum(1) - 1) * mask, exists)

    def sums(self, x: Tensor, counted: Tensor) -> Tensor:
        """Of each turn the sum of `x` over its `counted` tokens, both `[batch, seq]`: `[batch, turns]`."""
        x = masked(x, counted)
        return x.new_zeros(self.exists.shape).scatter_add(1, self.number, x)

    def spread(self, of_turns: Tensor) -> Tensor:
        """What `[batch, turns]` say of turns for each of their tokens, `[batch, seq]`; 0 where masked."""
        return masked(of_turns.gather(1, self.number), self.mask)


def turn_advantages(rewards: Tensor, mask: Tensor, group_size: int, discount: float) -> Tensor:
    """Advantages of the turns of a group's episodes, `[batch, seq]`, 0 where masked.

    A turn's return is its own reward and that of later turns, discounted by how many turns later they are. It is
    compared with the returns of the group's episodes at the turn of the same number, as grpo compares responses:
    (R - mean) / (std + 1e-4), with the (n - 1) standard deviation of the n episodes that have such a turn; 0 for a turn
    that is alone. With one turn an episode this is grpo's advantage. Returns of turns in place of whole episodes'
    rewards are from Group Turn Policy Optimization (Ding et al., 2511.14846); which of them are compared is our own
    choice.

    Args:
        rewards: `[batch, seq]`, the rows of a group one after the other; a turn's reward is the sum over its tokens.
        mask: `[batch, seq]` bool, True on response tokens.
    """
    turns = Turns.of(mask)
    returns = returns_to_go(turns.sums(rewards, mask), turns.exists, discount)
    groups, present = (x.reshape(-1, group_size, x.shape[1]) for x in (returns, turns.exists))
    counts = present.sum(1, keepdim=True)
    centered = masked(groups - groups.sum(1, keepdim=True) / counts.clamp(min=1), present)
    std = (centered.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
    return turns.spread((centered / (std + 1e-4)).reshape(returns.shape))


def turn_gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """GAE over turns instead of tokens (turn-level PPO, 2512.17008): delta = r + gamma V' - V, where r is the reward of
    a turn, V the value before its first token and V' that before the next turn's. gamma and lam count turns. With turns
    of one token this is `gae`.

    Args and returns as `gae`; all tokens of a turn have its advantage, and its return for a target.
    """
    turns = Turns.of(mask)
    before, earned = turns.sums(values, turns.begins), turns.sums(rewards, mask)
    advantages, returns = gae(before, earned, turns.exists, gamma, lam)
    return turns.spread(advantages), turns.spread(returns)
