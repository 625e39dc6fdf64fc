"""Environments of gymnasium (https://gymnasium.farama.org) whose observations and actions can be texts.

class Lake(Gymnasium):
    name = "FrozenLake-v1"
    options = {"is_slippery": False, "render_mode": "ansi"}
    task = "Walk from S to G. Say 0 for left, 1 for down, 2 for right or 3 for up."
"""

from typing import Any, ClassVar

import gymnasium
from gymnasium.spaces import Discrete, Text

from coati.rollout.environment import Observation


class Gymnasium:
    """A row may have `seed`. The policy says a number where actions are `Discrete`, a text where they are `Text`; with
    others, a subclass has its own `action`. What is no action is answered, and changes nothing.

    Attributes:
        name: of the environment, as registered; set by a subclass.
        options: for `gymnasium.make`. With the render mode "ansi" the policy reads what is drawn, else the observation.
        task: what the policy is told first.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    task: ClassVar[str] = ""

    def __init__(self):
        self.environment = gymnasium.make(self.name, **self.options)

    def reset(self, row: dict[str, Any]) -> str:
        observation, _ = self.environment.reset(seed=row.get("seed"))
        return f"{self.task}\n\n{self.describe(observation)}".strip()

    def step(self, message: dict[str, Any]) -> Observation:
        action = self.action(message["content"].strip())
        if action is None:
            return Observation("This is no action.")
        observation, reward, terminated, truncated, _ = self.environment.step(action)
        return Observation(self.describe(observation), float(reward), done=terminated or truncated)

    def action(self, text: str) -> Any:
        """The action that a text is; None for none."""
        space = self.environment.action_space
        if isinstance(space, Text):
            return text if space.contains(text) else None
        if not isinstance(space, Discrete):
            raise TypeError(f"actions of {self.name} are {space}: override `action`")
        number = int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else None
        return number if number is not None and space.contains(number) else None

    def describe(self, observation: Any) -> str:
        """What the policy reads of an observation."""
        if self.environment.render_mode == "ansi":
            return self.environment.render()
        return str(observation)

    def close(self):
        self.environment.close()
