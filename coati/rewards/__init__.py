"""What scores a response. A reward has a `name` and one method:

    score(prompts, responses, **columns) -> float tensor [batch]

`prompts` and `responses` are lists of texts; `columns` are the data's other fields, one list each, and the token ids
that were sampled: `input_ids` and `attention_mask`, tensors `[batch, seq]`.
"""

from coati.rewards.base import Reward, WeightedRewards, load_rewards
from coati.rewards.function import FunctionReward, load_function
from coati.rewards.model import ModelReward
from coati.rewards.normalise import RunningMoments

__all__ = [
    "FunctionReward",
    "ModelReward",
    "Reward",
    "RunningMoments",
    "WeightedRewards",
    "load_function",
    "load_rewards",
]
