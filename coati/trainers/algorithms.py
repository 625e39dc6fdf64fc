"""The algorithms there are. Free of torch: settings are read before it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from coati.trainers.config import (
    DistillConfig,
    GRPOConfig,
    PPOConfig,
    PreferenceConfig,
    PRMConfig,
    RewardConfig,
    SFTConfig,
    TrainerConfig,
)


@dataclass(frozen=True)
class Algorithm:
    """An algorithm by its settings and its trainer.

    Attributes:
        config: the class of its settings.
        place: of the trainer, or what makes one of settings and a runtime, as `module:name`.
    """

    config: type[TrainerConfig]
    place: str

    def trainer(self) -> Callable:
        """Imports it."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(module), name)


ALGORITHMS = {
    "sft": Algorithm(SFTConfig, "coati.trainers.sft:SFTTrainer"),
    "reward": Algorithm(RewardConfig, "coati.trainers.reward:reward_trainer"),
    "prm": Algorithm(PRMConfig, "coati.trainers.prm:PRMTrainer"),
    "preference": Algorithm(PreferenceConfig, "coati.trainers.preference:preference_trainer"),
    "ppo": Algorithm(PPOConfig, "coati.trainers.ppo:PPOTrainer"),
    "grpo": Algorithm(GRPOConfig, "coati.trainers.grpo:GRPOTrainer"),
    "distill": Algorithm(DistillConfig, "coati.trainers.distill:distill_trainer"),
}
