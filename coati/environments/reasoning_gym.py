"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym), with as many attempts as a row gives."""

from typing import Any, ClassVar

from reasoning_gym import create_dataset

from coati.errors import UserError
from coati.rewards.verifiable import ReasoningGymVerifier
from coati.rollout.environment import Observation


class ReasoningGym:
    """A row is an entry as `reasoning_gym.create_dataset` yields it, or has `task` and `seed`, and may have `options`:
    then its entry is made here. `attempts` is how many answers may be given (1).

    An answer is what stands in the last `<answer>` tags, else all that follows the thought. The episode's reward is the
    last answer's score, from 0 to 1; a wrong answer is told to be wrong while attempts are left.

    Attributes:
        allow_code_execution: allows tasks whose scorer evaluates the answer as Python; set by a subclass.
    """

    allow_code_execution: ClassVar[bool] = False

    def reset(self, row: dict[str, Any]) -> str:
        self.entry = row if "question" in row else generated(row)
        self.scorer = ReasoningGymVerifier(allow_code_execution=self.allow_code_execution).scorer(
            self.entry.get("metadata")
        )
        self.left = row.get("attempts", 1)
        self.attempts = 0
        return self.entry["question"]

    def step(self, message: dict[str, Any]) -> Observation:
        self.attempts += 1
        self.left -= 1
        score = float(self.scorer(stated(message["content"]), self.entry))
        metrics = {"attempts": self.attempts, "solved": float(score == 1)}
        if score == 1 or self.left <= 0:
            return Observation(reward=score, done=True, metrics=metrics)
        return Observation("That is not right. Try again.", metrics=metrics)


def generated(row: dict[str, Any]) -> dict[str, Any]:
    """A task's entry, the same for the same seed.

    Raises:
        UserError: the row names no task, or gives it options that it doesn't have.
    """
    if not {"task", "seed"} <= row.keys():
        raise UserError(f"a row of reasoning-gym has `question`, or `task` and `seed`; this one has {', '.join(row)}")
    try:
        return create_dataset(row["task"], size=1, seed=row["seed"], **row.get("options", {}))[0]
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning-gym makes no task {row['task']!r} of these options: {error}") from None


def stated(text: str) -> str:
    """The answer that a message gives."""
    text = text.rpartition("</think>")[2]
    before, opened, after = text.rpartition("<answer>")
    return (after.partition("</answer>")[0] if opened else before + after).strip()
