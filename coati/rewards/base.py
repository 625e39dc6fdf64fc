"""The protocol of a reward."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from coati.samples import Sample


@dataclass(frozen=True)
class Outcome:
    """The result for one sample.

    Attributes:
        score: None if the reward skips the sample.
        error: why it has no score, if the reward failed.
        details: numbers beside the score, which are logged as `reward/NAME/...`.
    """

    score: float | None
    error: str = ""
    details: dict[str, float] = field(default_factory=dict)


class Reward:
    """What scores samples. A reward of your own derives from this, or is a function (`FunctionReward`).

    Attributes:
        name: shown in metrics and errors.
        per_response: it looks at each sample alone. It is then asked for one at a time, may work in a process of its
            own while responses are generated, and a sample that it fails for is counted and gets a default score.
        on_tokens: it gives a number for each token instead of one for the response.
        worker_spec: what another process makes it again from: itself if it can be pickled, or the place of a function
            (`FILE.py:function`); None if it works in this process only.
        has_details: its outcomes have `details`.
        about: a line for the start of a run; "" for none.
    """

    name = "reward"
    per_response = False
    on_tokens = False
    worker_spec: Any = None
    has_details = False
    about = ""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None] | Sequence[Sequence[float] | None]:
        """One number per sample; with `on_tokens` one per token of each sample, of which those of sampled tokens count.
        None to skip a sample: the other rewards alone count there."""
        raise NotImplementedError

    def begin(self, sample: Sample) -> "Future[Outcome] | None":
        """Of a reward `per_response` that waits for something outside this process: has a finished sample scored while
        others are generated. None where `score` is to be called.

        The future may raise what must stop the run; all other trouble is an outcome with an error.
        """
        return None

    def outcomes(self, samples: Sequence[Sample]) -> list[Outcome] | None:
        """Of a reward that looks at samples together and may fail for some of them: a result for each. None where
        `score` is to be called."""
        return None

    def check(self, rows: Sequence[dict[str, Any]]):
        """Called once, before anything is generated.

        Args:
            rows: the columns of some of the data's rows.

        Raises:
            UserError: it can't score rows like these.
        """

    def load(self):
        """Prepares in the process that scores; permanent failures are raised here."""


def columns_of(samples: Sequence[Sample]) -> dict[str, list]:
    """By name, a value per sample: the data's other fields, None where a row lacks one, and whether the response was
    truncated at its maximum length (`truncated`)."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    columns = {name: [sample.columns.get(name) for sample in samples] for name in names}
    return columns | {"truncated": [sample.truncated for sample in samples]}
