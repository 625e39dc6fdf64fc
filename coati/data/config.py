"""The settings of everything in `coati.data`."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from coati.config import ListOf, Settings, option, settings
from coati.errors import UserError


@settings
class DataConfig(Settings):
    """Which rows to read and how to turn them into tokens."""

    train_data: ListOf[str] = option(
        (), "files (.jsonl, .json, .parquet) or `datasets` names (org/name/config:split)", path="data", common=True
    )
    train_weights: ListOf[float] | None = option(
        None, "one weight per source: 2.0 is seen twice an epoch, 0.5 a random half of it each epoch"
    )
    eval_data: ListOf[str] = option((), "files or `datasets` names to evaluate on", path="data", common=True)
    max_length: int = option(
        1024,
        "longest SFT or preference row, in tokens, response and EOS included; and longest prompt of a teacher",
        ge=1,
        common=True,
    )
    max_prompt_length: int = option(512, "longest prompt row, in tokens", ge=1, common=True)
    too_long: Literal["drop", "truncate_prompt"] = option(
        "drop", "what to do with a longer row: drop it, or cut the prompt's left end"
    )
    bad_rows: Literal["error", "drop"] = option("error", "on rows that do not parse: stop, or drop and count")
    train_on: Literal["all", "last", "each"] = option(
        "all", "SFT learns every assistant turn of a dialogue, the last only, or each in a row of its own"
    )
    step_separator: str = option("\n", "what stands between the steps of a response, of process reward models")
    chat_template: str | None = option(
        None, "a jinja file to use instead of the tokenizer's own chat template", path="file"
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "arguments of the chat template, such as {enable_thinking: false}"
    )
    eos_token: str | None = option(None, "the token that ends a response, if it is not the tokenizer's EOS token")
    cache_dir: str | None = option(None, "where tokenized data is kept (default ~/.cache/coati)", path="output")

    def problems(self) -> Iterator[str]:
        if not self.step_separator:
            yield "step_separator is empty: give the text between two steps"
        yield from weight_problems(self.train_weights, self.train_data, "train_weights")

    @property
    def template_arguments(self) -> dict[str, Any]:
        """`chat_template_kwargs`, empty for none."""
        return self.chat_template_kwargs or {}


def weight_problems(weights: list[float] | None, sources: list[str], name: str) -> Iterator[str]:
    """What is wrong unless there is one weight >= 0 per source and some weight is above 0."""
    if weights is None:
        return
    if len(weights) != len(sources):
        yield f"{name} has {len(weights)} values for {len(sources)} sources: give one per source"
    elif not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        yield f"{name} is {weights}: give finite values of 0 or more, not all 0"


def check_weights(weights: list[float] | None, sources: list[str], name: str):
    """Raises a UserError with `weight_problems`."""
    for problem in weight_problems(weights, sources, name):
        raise UserError(problem)
