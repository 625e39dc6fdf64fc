"""The models of RLHF, each an nn.Module around a transformers model."""

from coati.models.actor import Actor
from coati.models.base import BaseModel
from coati.models.critic import Critic
from coati.models.lora import LoraSettings
from coati.models.reward_model import RewardModel

__all__ = ["Actor", "BaseModel", "Critic", "LoraSettings", "RewardModel"]
