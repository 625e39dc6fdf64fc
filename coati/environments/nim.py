"""Nim: two players take stones in turn. The policy plays both of them, or one against a random player."""

import random
from typing import Any

from coati.data.messages import Messages
from coati.rollout.environment import Observation

MOST = 3  # stones that a player may take


class Nim:
    """Players take 1 to 3 stones in turn; whoever takes the last one wins. A row has `stones`.

    The policy's messages are the moves of both players, and each is rewarded for its own player: 1 for the winner's, -1
    for the loser's. A move that is no number from 1 to 3, or more than there are, loses the game. An episode's rewards
    are of two players, so they are meant for single turns (`turn_rewards`).

    With `opponent: random` in the row the policy is one of the players, and the other draws its moves by the row's
    `seed`; with `second: true` the other one begins, unless it could win at once. Then `won` is measured.
    """

    def reset(self, row: dict[str, Any]) -> Messages:
        self.stones, self.moves = row["stones"], 0
        self.opponent = random.Random(row["seed"]) if row.get("opponent") == "random" else None
        if type(self.stones) is not int or self.stones < 1:
            raise ValueError(f"a game of {self.stones} stones")
        if self.opponent and row.get("second") and self.stones > MOST:
            self.stones -= self.opponent.randint(1, MOST)
        return [{"role": "user", "content": self.state()}]

    def state(self) -> str:
        return f"Nim: {self.stones} left. Take 1 to {MOST}."

    def step(self, message: dict[str, Any]) -> Observation:
        self.moves += 1
        text = message["content"].strip()
        taken = int(text) if text in ("1", "2", "3") else 0
        if not 1 <= taken <= self.stones:
            return self.end(wins=False, illegal=True)
        self.stones -= taken
        if self.stones == 0:
            return self.end(wins=True)
        if self.opponent:
            self.stones -= self.opponent.randint(1, min(MOST, self.stones))
            if self.stones == 0:
                return self.end(wins=False)
        return Observation([{"role": "user", "content": self.state()}], metrics=self.metrics())

    def end(self, wins: bool, illegal: bool = False) -> Observation:
        """The last mover wins or loses.

        Args:
            illegal: its move was.
        """
        reward = 1.0 if wins else -1.0
        if self.opponent:
            earlier = [reward] * (self.moves - 1)
        else:  # the move before it was the other player's
            earlier = [reward if (self.moves - 1 - i) % 2 == 0 else -reward for i in range(self.moves - 1)]
        return Observation(reward=reward, earlier_rewards=earlier, done=True, metrics=self.metrics(wins, illegal))

    def metrics(self, won: bool = False, illegal: bool = False) -> dict[str, float]:
        """Of the game so far, for those too that are cut before their end."""
        return {"illegal": float(illegal)} | ({"won": float(won)} if self.opponent else {})
