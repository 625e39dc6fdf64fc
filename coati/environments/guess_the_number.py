"""Guess the number: the policy says one, and hears whether the secret one is higher or lower."""

import re
from typing import Any

from coati.data.messages import Messages
from coati.rollout.environment import Observation

NUMBER = re.compile(r"[0-9]+")


class GuessTheNumber:
    """A row has `secret`, and may have `low` (1) and `high` (16), the bounds that the policy is told, and `attention`.

    The right guess earns 1, and ends the episode. A wrong one earns `attention` (0) if it agrees with all answers so
    far. A response is a guess if it is a number and nothing else: several of them, or a number outside the bounds, are
    answered as no guess and earn nothing.
    """

    def reset(self, row: dict[str, Any]) -> Messages:
        self.secret, self.low, self.high = row["secret"], row.get("low", 1), row.get("high", 16)
        if not self.low <= self.secret <= self.high:
            raise ValueError(f"the secret {self.secret} is not from {self.low} to {self.high}")
        self.least, self.most, self.attention = self.low, self.high, row.get("attention", 0.0)
        return [{"role": "user", "content": f"Guess a number from {self.low} to {self.high}."}]

    def step(self, message: dict[str, Any]) -> Observation:
        text = message["content"].strip()
        guess = int(text) if NUMBER.fullmatch(text) and len(text) <= len(str(self.high)) else None
        if guess is None or not self.low <= guess <= self.high:
            return answer(f"Say one number from {self.low} to {self.high}.")
        if guess == self.secret:
            return Observation(reward=1.0, done=True, metrics={"won": 1.0})
        reward = self.attention if self.least <= guess <= self.most else 0.0
        if guess < self.secret:
            self.least = max(self.least, guess + 1)
            return answer("Higher.", reward)
        self.most = min(self.most, guess - 1)
        return answer("Lower.", reward)


def answer(text: str, reward: float = 0.0) -> Observation:
    return Observation([{"role": "user", "content": text}], reward, metrics={"won": 0.0})
