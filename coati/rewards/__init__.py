"""What scores samples, see `coati.rewards.base`.

The classes are imported when they are asked for: the processes of `coati.rewards.pool` don't load torch.
"""

from importlib import import_module

HOME = {
    "AdapterReward": "adapter",
    "EnvironmentReward": "environment",
    "FunctionReward": "function",
    "HTTPReward": "http",
    "JudgeReward": "judge",
    "ModelReward": "model",
    "ObjectivesReward": "objectives",
    "Outcome": "base",
    "ProcessReward": "process",
    "ReferenceComparisonReward": "judge",
    "Reward": "base",
    "RubricReward": "rubric",
    "RunningMoments": "normalize",
    "Scorer": "scorer",
    "ScoringConfig": "config",
    "SequenceClassifierReward": "classifier",
    "TournamentReward": "judge",
    "Verifier": "verifiable",
    "import_function": "function",
    "load_function": "function",
    "load_rewards": "config",
}
__all__ = [*HOME]


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"coati.rewards.{HOME[name]}"), name)
