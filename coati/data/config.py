"""The settings of everything in `coati.data`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from coati.config.options import Settings
from coati.errors import UserError


@dataclass
class DataConfig(Settings):
    """Which rows to read and how to turn them into tokens.

    Raises `UserError` when a length is not positive or the weights do not fit the sources.
    """

    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "common": True,
            "help": "Files (.jsonl, .json, .parquet) or `datasets` names (org/name/config:split).",
            "path": "data",
        },
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight a source: 2.0 is seen twice an epoch, 0.5 a random half each epoch."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"common": True, "help": "Files or `datasets` names to evaluate on.", "path": "data"},
    )
    max_length: int = field(
        default=1024,
        metadata={
            "common": True,
            "help": "Longest SFT or preference row, in tokens, answer and EOS included.",
            "ge": 1,
        },
    )
    max_prompt_length: int = field(
        default=512, metadata={"common": True, "help": "Longest prompt row, in tokens.", "ge": 1}
    )
    too_long: Literal["drop", "truncate_prompt"] = field(
        default="drop", metadata={"help": "What to do with a longer row: drop it, or cut the prompt's left end."}
    )
    bad_rows: Literal["error", "drop"] = field(
        default="error", metadata={"help": "What to do about rows that do not parse: stop, or drop and count."}
    )
    train_on: Literal["all", "last", "each"] = field(
        default="all",
        metadata={"help": "SFT learns every assistant turn of a dialogue, the last only, or each in a row of its own."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "A jinja file to use instead of the tokenizer's own chat template.", "path": "file"},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, a mapping; as a flag JSON: '{\"enable_thinking\": false}'."},
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "The token that ends an answer, when it is not the tokenizer's own EOS token."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where tokenised data is kept (default ~/.cache/coati).", "path": "output"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.train_weights, self.train_data, "--train_weights")
        self.chat_template_kwargs = self.template_arguments

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs` as a mapping, empty for none."""
        value = self.chat_template_kwargs
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UserError(f"--chat_template_kwargs {value} is not JSON ({error}); quote it for the shell.") from None
        if found is not None and not isinstance(found, dict):
            raise UserError(f'--chat_template_kwargs is {value}; give a mapping, such as {{"enable_thinking": false}}.')
        return found or {}


def check_weights(weights: list[float] | None, sources: list[str], name: str) -> None:
    """Raise `UserError` unless there is one finite weight >= 0 a source and some weight is above 0."""
    if weights is None:
        return
    if len(weights) != len(sources):
        raise UserError(f"{name} has {len(weights)} values for {len(sources)} sources; give one a source.")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise UserError(f"{name} is {weights}; give finite values of 0 or more, not all 0.")
