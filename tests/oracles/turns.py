"""Credit for turns as loops over python floats."""

import math
import statistics

from tests.oracles import advantages


def _turns(mask_row):
    """The columns of each run of True entries."""
    runs = []
    for t, counts in enumerate(mask_row):
        if counts and t > 0 and mask_row[t - 1]:
            runs[-1].append(t)
        elif counts:
            runs.append([t])
    return runs


def turn_advantages(rewards, mask, group_size, discount):
    """Each turn's discounted return beside those of the group's turns of the same number."""
    result = [[0.0] * len(row) for row in mask]
    turns = [_turns(row) for row in mask]
    returns = []
    for row, of_row in zip(rewards, turns, strict=True):
        earned = [math.fsum(row[t] for t in turn) for turn in of_row]
        returns.append([math.fsum(discount**k * r for k, r in enumerate(earned[i:])) for i in range(len(earned))])
    for b, of_row in enumerate(turns):
        start = b // group_size * group_size
        for i, turn in enumerate(of_row):
            compared = [found[i] for found in returns[start : start + group_size] if len(found) > i]
            if len(compared) < 2:
                continue
            advantage = (returns[b][i] - math.fsum(compared) / len(compared)) / (statistics.stdev(compared) + 1e-4)
            for t in turn:
                result[b][t] = advantage
    return result


def turn_gae(values, rewards, mask, gamma, lam):
    """GAE of a sequence of turns, spread over their tokens."""
    advantage, target = ([[0.0] * len(row) for row in mask] for _ in range(2))
    for b, row in enumerate(mask):
        turns = _turns(row)
        before = [[values[b][turn[0]] for turn in turns]]
        earned = [[math.fsum(rewards[b][t] for t in turn) for turn in turns]]
        of_turns = advantages.gae(before, earned, [[True] * len(turns)], gamma, lam)
        for i, turn in enumerate(turns):
            for t in turn:
                advantage[b][t], target[b][t] = of_turns[0][0][i], of_turns[1][0][i]
    return advantage, target
