"""The models of RLHF, each an nn.Module around a transformers model."""

from coati.models.actor import Actor
from coati.models.actor_critic import ActorCritic
from coati.models.base import BaseModel
from coati.models.compat import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from coati.models.critic import Critic
from coati.models.lora import LoraSettings
from coati.models.objective_reward_model import ObjectiveRewardModel
from coati.models.process_reward_model import ProcessRewardModel
from coati.models.reward_model import RewardModel
from coati.models.value_head import ValueHead

__all__ = [
    "Actor",
    "ActorCritic",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BaseModel",
    "Critic",
    "LoraSettings",
    "ObjectiveRewardModel",
    "PreTrainedModelWrapper",
    "ProcessRewardModel",
    "RewardModel",
    "ValueHead",
    "create_reference_model",
]
