"""The learning-rate schedule, with the length of the warm-up counted exactly."""

import math
from fractions import Fraction


def learning_rate_at(step, total, peak, schedule, warmup: str, final_rate):
    """`warmup` as the text a user types, such as "0.07": 0.07 of 100 steps are 7 steps."""
    rising = math.ceil(Fraction(warmup) * total)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / (total - rising)
    low = peak * final_rate
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak + (low - peak) * done
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))
