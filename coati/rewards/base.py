"""The protocol of a reward, and the weighted sum of several."""

from typing import Protocol

import torch
from torch import Tensor

from coati.errors import UserError


class Reward(Protocol):
    """Anything that scores responses."""

    name: str

    def score(self, prompts: list[str], responses: list[str], **columns) -> Tensor:
        """One float a response, `[batch]`."""


class WeightedRewards:
    """The weighted sum of rewards, each checked.

    Args:
        rewards: pairs of a reward and its weight.
    """

    def __init__(self, rewards: list[tuple[Reward, float]]):
        self.rewards = rewards
        names = [reward.name for reward, _ in rewards]
        # two functions are often both called `reward`: the second is `reward_2`
        self.names = [n if names[:i].count(n) == 0 else f"{n}_{names[:i].count(n) + 1}" for i, n in enumerate(names)]

    def score(self, prompts: list[str], responses: list[str], **columns) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, float32 `[batch]` on the CPU, and each reward's own scores by name.

        Raises:
            UserError: a reward gives the wrong number of scores, or NaN or an infinity; it names the reward and the
                first response concerned.
        """
        total, parts = torch.zeros(len(responses)), {}
        for name, (reward, weight) in zip(self.names, self.rewards, strict=True):
            raw = reward.score(prompts, responses, **columns)
            try:
                scores = torch.as_tensor(raw, dtype=torch.float32).cpu()
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"reward {name!r} gave {str(raw)[:80]}: it must return one number a response ({error})"
                ) from error
            if scores.shape != (len(responses),):
                raise UserError(
                    f"reward {name!r} gave shape {list(scores.shape)} for {len(responses)} responses: "
                    "it must return one number a response"
                )
            if not scores.isfinite().all():
                worst = int((~scores.isfinite()).nonzero()[0, 0])
                raise UserError(
                    f"reward {name!r} gave {scores[worst].item()} for the response {responses[worst][:80]!r}: "
                    "a reward must be finite"
                )
            parts[name] = scores
            total += weight * scores
        return total, parts


def load_rewards(
    functions: list[str], function_weights: list[float] | None, model: Reward | None, model_weight: float, more=()
):
    """The rewards of a run: an optional reward model and python functions.

    Raises:
        UserError: no reward at all, or not one weight a function.
    """
    from coati.rewards.function import load_function

    weights = [1.0] * len(functions) if function_weights is None else function_weights
    if len(weights) != len(functions):
        raise UserError(f"reward_function_weights has {len(weights)} entries for {len(functions)} reward functions")
    rewards = [(reward, 1.0) for reward in more] + ([] if model is None else [(model, model_weight)])
    rewards += [(load_function(name), weight) for name, weight in zip(functions, weights, strict=True)]
    if not rewards:
        raise UserError("no reward: give --reward_model FOLDER or --reward_functions FILE.py:function")
    return WeightedRewards(rewards)
