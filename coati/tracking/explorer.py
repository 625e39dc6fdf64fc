"""The part of the report in which a reader filters, sorts and compares samples: its data and its HTML.

The page's script (page/report.js) fills the tables; without a script nothing of this part is shown.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"

STEPS = 16  # of a run that are on the page: the first, the last, and others evenly between
ROWS = 64  # of a run at a step
CHARACTERS = 4000  # of a text
_TEXTS = ("step", "name", "prompt", "response", "conversation", "reward")

Samples = list[dict[str, Any]]


def explorer(runs: Sequence[tuple[str, Samples]]) -> str:
    """The part as HTML, "" if no run has samples.

    Args:
        runs: the name of each run, and its rows of samples.jsonl.
    """
    if not any(samples for _, samples in runs):
        return ""
    controls = (PAGE / "explorer.html").read_text(encoding="utf-8")
    return f"{controls}<script type='application/json' id='samples-data'>{as_script_data(sample_data(runs))}</script>"


def sample_data(runs: Sequence[tuple[str, Samples]]) -> dict[str, Any]:
    """What the script reads: `runs` (names), `kinds` (names of samples), `length_unit`, `left_out` (how many samples
    are not on the page) and `samples`, in each of which `run` is a place in `runs`."""
    chosen = [(place, row) for place, (_, samples) in enumerate(runs) for row in _chosen(samples)]
    in_tokens = all("response_length" in row for _, row in chosen)
    return {
        "runs": [name for name, _ in runs],
        "kinds": list(dict.fromkeys(row["name"] for _, row in chosen)),
        "length_unit": "tokens" if in_tokens else "characters",
        "left_out": sum(len(samples) for _, samples in runs) - len(chosen),
        "samples": [_sample(place, row, in_tokens) for place, row in chosen],
    }


def as_script_data(value: Any) -> str:
    """JSON that can't end the `<script>` that it stands in, whatever texts it holds."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _chosen(samples: Samples) -> Samples:
    """The rows of a run that are on the page."""
    by_step: dict[tuple[str, int], Samples] = defaultdict(list)
    for row in samples:
        by_step[row["name"], row["step"]].append(row)
    chosen: Samples = []
    for name in dict.fromkeys(row["name"] for row in samples):
        steps = sorted(step for kind, step in by_step if kind == name)
        for step in evenly(steps, STEPS):
            chosen += by_step[name, step][:ROWS]
    return chosen


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values: the first, the last, and others evenly between."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _sample(run: int, row: dict[str, Any], in_tokens: bool) -> dict[str, Any]:
    response = _text(row.get("response"))
    more = {name: value for name, value in row.items() if name not in _TEXTS}
    reward = row.get("reward")
    return {
        "run": run,
        "step": row["step"],
        "kind": row["name"],
        "prompt": _shortened(_text(row.get("prompt"))),
        "response": _shortened(response),
        "turns": [_turn(message) for message in row.get("conversation", [])],
        "reward": reward if isinstance(reward, int | float) else None,  # a NaN is stored as text
        "length": row["response_length"] if in_tokens else len(response),
        "more": {name: _shortened(_text(value)) for name, value in more.items()},
    }


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    text = message["content"]
    if "malformed_call" in message:
        text += f"\n(no call: {message['malformed_call']})"
    return {"role": message["role"], "text": _shortened(text), "reward": message.get("reward")}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " […]"
