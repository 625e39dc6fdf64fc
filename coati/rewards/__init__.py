"""What scores a response. A reward has a `name` and one method:

    score(prompts, responses, **columns) -> float tensor [batch]

`prompts` and `responses` are lists of texts; `columns` are the data's other fields, one list each, and the token ids
that were sampled: `input_ids`, `attention_mask` and `response_mask`, tensors `[batch, seq]`. A reward may give one
number a token instead, see `Reward`.
"""

from coati.rewards.adapter import AdapterReward
from coati.rewards.base import Reward, Scores, WeightedRewards
from coati.rewards.classifier import SequenceClassifierReward
from coati.rewards.config import ScoringConfig, load_rewards
from coati.rewards.function import FunctionReward, import_function, load_function
from coati.rewards.http import HTTPReward
from coati.rewards.model import ModelReward
from coati.rewards.normalise import RunningMoments

__all__ = [
    "AdapterReward",
    "FunctionReward",
    "HTTPReward",
    "ModelReward",
    "Reward",
    "RunningMoments",
    "Scores",
    "ScoringConfig",
    "SequenceClassifierReward",
    "WeightedRewards",
    "import_function",
    "load_function",
    "load_rewards",
]
