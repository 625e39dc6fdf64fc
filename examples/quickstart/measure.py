"""The quickstart's independent measure: is a reply polite and on topic? Written by rule, never trained on.

PPO climbs a learned reward model, so only something that knows nothing of that model can tell a better policy
from one that fools it.
"""

import re
from collections.abc import Sequence

TOPICS = frozenset(
    [
        "order",
        "delivery",
        "refund",
        "exchange",
        "repair",
        "warranty",
        "invoice",
        "discount",
        "voucher",
        "manual",
        "stock",
        "hours",
    ]
)
POLITE = re.compile(r"\b(thank you|please|sorry|happy to help|glad|with pleasure|welcome|lovely day)\b")
RUDE = re.compile(
    r"\b(not my problem|who cares|you again|silly|waste|read the page yourself"
    r"|go away|stop|bothering|leave us alone|ask somebody else|be quiet|boring)\b"
)


def topics_of(text: str) -> frozenset[str]:
    """The topic words that `text` contains."""
    return TOPICS.intersection(re.findall(r"[a-z]+", text.lower()))


def is_good(prompt: str, response: str) -> bool:
    """Whether `response` is polite, without a rude word, and about the topic of `prompt` and no other.

    A reply that lists every topic, or that never changes, is therefore not good.
    """
    text = response.lower()
    on_topic = topics_of(response) == topics_of(prompt) != frozenset()
    return on_topic and bool(POLITE.search(text)) and not RUDE.search(text)


def measure(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """The share of good replies, in [0, 1].

    Args:
        prompts: customer messages, alone or within a chat template.
        responses: one reply to each, without the prompt.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"measure needs as many responses as prompts, got {len(responses)} and {len(prompts)}")
    return sum(map(is_good, prompts, responses)) / len(prompts)
