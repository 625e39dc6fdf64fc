"""Generators: processes of their own that sample while the policy trains."""

from typing import Literal

from coati.config.options import Settings, option, settings


@settings
class GeneratorsConfig(Settings):
    """Sampling in processes of their own, which `coati run --generators` starts, see docs/asynchronous.md."""

    max_staleness: int = option(
        0,
        "iterations that sampling is ahead: iteration k samples with the weights of k minus this, while others train",
        ge=0,
        common=True,
    )
    partial_rollouts: bool = option(
        False,
        "responses are drawn in max_staleness parts, each with newer weights, so that sampling waits for no long one",
    )
    weights_folder: str | None = option(
        None,
        "where versions of the weights are written for generators, a folder of its own, such as one in /dev/shm on one "
        "machine; RUN/weights if not given",
        path="output",
    )
    weights_format: Literal["whole", "differences"] = option(
        "whole",
        "what a version's file holds: the whole weights, or what of them is not as in the version before, which is "
        "less at low learning rates in bf16; samples are the same",
    )
    keep_journal: bool = option(True, "samples stay in RUN/journal when no resume needs them any more")
