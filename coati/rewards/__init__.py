"""What scores a response. A reward has a `name` and one method:

    score(prompts, responses, **columns) -> float tensor [batch]

`prompts` and `responses` are lists of texts; `columns` are the data's other fields, one list each, and the token ids
that were sampled: `input_ids`, `attention_mask` and `response_mask`, tensors `[batch, seq]`. A reward may give one
number a token instead, see `Reward`.

The classes are imported when they are asked for: the processes of `coati.rewards.pool` do without torch.
"""

from importlib import import_module

HOME = {
    "AdapterReward": "adapter",
    "FunctionReward": "function",
    "HTTPReward": "http",
    "ModelReward": "model",
    "PendingScores": "base",
    "Reward": "base",
    "RunningMoments": "normalise",
    "Scores": "base",
    "ScoringConfig": "config",
    "SequenceClassifierReward": "classifier",
    "Verifier": "verifiable",
    "WeightedRewards": "base",
    "import_function": "function",
    "load_function": "function",
    "load_rewards": "config",
}
__all__ = [*HOME]


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"coati.rewards.{HOME[name]}"), name)
