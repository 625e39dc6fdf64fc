"""Guess the number: the policy says one, and hears whether the secret one is higher or lower."""

import math
import re
from typing import Any

from coati.data.messages import Messages
from coati.rollout.environment import Observation

NUMBER = re.compile(r"[0-9]+")


class GuessTheNumber:
    """A row has `secret`, and may have `low` (1) and `high` (16), the bounds that the policy is told, and `narrowing`.

    The right guess earns 1, and ends the episode. A guess that leaves fewer numbers possible earns a share of
    `narrowing` (0), by how many halvings that is of those to a single number: over an episode the shares add up to what
    was narrowed down in all, so that no order of guesses earns more than finding out (Ng et al. 1999, potential-based
    shaping). A response is a guess if it is a number and nothing else: several of them, or a number outside the bounds,
    are answered as no guess and earn nothing.
    """

    def reset(self, row: dict[str, Any]) -> Messages:
        self.secret, self.low, self.high = row["secret"], row.get("low", 1), row.get("high", 16)
        if not self.low <= self.secret <= self.high:
            raise ValueError(f"the secret {self.secret} is not from {self.low} to {self.high}")
        self.least, self.most = self.low, self.high  # what the answers so far leave possible
        self.narrowing = row.get("narrowing", 0.0)
        return [{"role": "user", "content": f"Guess a number from {self.low} to {self.high}."}]

    def step(self, message: dict[str, Any]) -> Observation:
        text = message["content"].strip()
        guess = int(text) if NUMBER.fullmatch(text) and len(text) <= len(str(self.high)) else None
        if guess is None or not self.low <= guess <= self.high:
            return answer(f"Say one number from {self.low} to {self.high}.")
        possible = self.most - self.least + 1
        if guess == self.secret:
            return Observation(reward=1.0 + self.share(possible, 1), done=True, metrics={"won": 1.0})
        if guess < self.secret:
            self.least = max(self.least, guess + 1)
        else:
            self.most = min(self.most, guess - 1)
        reward = self.share(possible, self.most - self.least + 1)
        return answer("Higher." if guess < self.secret else "Lower.", reward)

    def share(self, before: int, after: int) -> float:
        """Of `narrowing`, for going from so many possible numbers to so many."""
        halvings = math.log2(self.high - self.low + 1)
        return self.narrowing * math.log2(before / after) / halvings if halvings else 0.0


def answer(text: str, reward: float = 0.0) -> Observation:
    return Observation([{"role": "user", "content": text}], reward, metrics={"won": 0.0})
