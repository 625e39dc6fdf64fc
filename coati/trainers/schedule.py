"""Learning-rate schedules as pure functions of the step: nothing to store, nothing to forget to step."""

import math


def learning_rate_at(step: int, total: int, peak: float, schedule: str, warmup: float, final_rate: float) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total`.

    Rises linearly over the first `warmup * total` steps to `peak`, then stays (constant) or falls, linearly or along a
    half cosine, to `final_rate * peak`.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}: choose constant, linear or cosine")
    warmup_steps = math.ceil(round(warmup * total, 9))  # 0.07 * 100 is a hair more than 7
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total - warmup_steps, 1)
    match schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - progress
        case _:
            share = (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_rate + (1 - final_rate) * share)
