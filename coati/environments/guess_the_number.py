"""Guess the number: the policy says one, and hears whether the secret one is higher or lower."""

import re
from typing import Any

from coati.data.messages import Messages
from coati.rollout.environment import Observation

NUMBER = re.compile(r"[0-9]+")


class GuessTheNumber:
    """A row has `secret`, and may have `low` (1) and `high` (16), the bounds that the policy is told.

    The right guess earns 1, and ends the episode; all else earns 0. A response is a guess if it is a number and nothing
    else: several of them, or a number outside the bounds, are answered as no guess.
    """

    def reset(self, row: dict[str, Any]) -> Messages:
        self.secret, self.low, self.high = row["secret"], row.get("low", 1), row.get("high", 16)
        if not self.low <= self.secret <= self.high:
            raise ValueError(f"the secret {self.secret} is not from {self.low} to {self.high}")
        return [{"role": "user", "content": f"Guess a number from {self.low} to {self.high}."}]

    def step(self, message: dict[str, Any]) -> Observation:
        text = message["content"].strip()
        guess = int(text) if NUMBER.fullmatch(text) and len(text) <= len(str(self.high)) else None
        if guess is None or not self.low <= guess <= self.high:
            return self._answer(f"Say one number from {self.low} to {self.high}.", invalid=1.0)
        if guess == self.secret:
            return Observation(reward=1.0, done=True, metrics={"invalid": 0.0})
        return self._answer("Higher." if guess < self.secret else "Lower.", invalid=0.0)

    def _answer(self, text: str, invalid: float) -> Observation:
        return Observation([{"role": "user", "content": text}], metrics={"invalid": invalid})
