"""Rewards by rule, for `rewards: [{type: function, path: examples/rewards.py:NAME}]`.

A reward function gets the prompts and responses as lists of texts and every other field of the data's rows as a list
of its own; it returns one finite number a response.
"""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def brevity(prompts, responses, **columns):
    """1 for a response of up to 8 words, 1/8 less for each word more, not below 0; 0 for no words.

    >>> brevity(["Hi"] * 3, ["It is free.", "a b c d e f g h i j", ""])
    [1.0, 0.75, 0.0]
    """
    counts = [len(response.split()) for response in responses]
    return [0.0 if n == 0 else min(1.0, max(0.0, 1 - (n - 8) / 8)) for n in counts]


def final_number(prompts, responses, *, answer, **columns):
    """1 where the last number of a response is the one after `####` in the row's `answer` (GSM8K), else 0.

    >>> final_number(["2 * 600?", "1 + 1?"], ["That makes 1,200.", "It is 3"], answer=["... #### 1200", "#### 2"])
    [1.0, 0.0]
    """
    found = [NUMBER.findall(response)[-1:] for response in responses]
    wanted = [NUMBER.findall(text.rpartition("####")[2])[-1:] for text in answer]
    return [float(bool(f) and _value(f[0]) == _value(w[0])) for f, w in zip(found, wanted, strict=True)]


def _value(number: str) -> float:
    return float(number.replace(",", ""))
