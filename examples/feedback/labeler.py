"""A simulated person with a taste, who labels through the page's own HTTP API as a browser does."""

import re
import uuid
from collections import Counter

import httpx

WISHED_WORDS = 25
SAME_LENGTH = 4  # a difference in words too small to have a preference
FEWEST_WORDS = 5
STOP_WORDS = """what how would should could know before explain child answer two sentences the and for you your are can
has have not but its this that these with from into they them their"""


def choice_of(question: str, left: str, right: str) -> str:
    """What somebody chooses who wants a brief, complete response that stays on topic: a, b, tie or both_bad.

    The choice follows from the texts alone. A response with a fault, see `faults`, never wins. Of two without one, the
    one nearer to 25 words wins, so that too short and too long lose alike; if neither is nearer by 4 words, it's a tie.
    """
    usable = [not faults(question, text) for text in (left, right)]
    if not any(usable):
        return "both_bad"
    if usable[0] != usable[1]:
        return "a" if usable[0] else "b"
    excess = [abs(len(text.split()) - WISHED_WORDS) for text in (left, right)]
    if abs(excess[0] - excess[1]) < SAME_LENGTH:
        return "tie"
    return "a" if excess[0] < excess[1] else "b"


def faults(question: str, response: str) -> list[str]:
    """What makes a response useless to somebody with this taste; nothing for a usable one."""
    checks = {
        "too short": len(response.split()) < FEWEST_WORDS,
        "cut off": not is_finished(response),
        "off topic": not is_on_topic(question, response),
        "the question again": is_echo(question, response),
        "repeats itself": repeats_itself(response),
    }
    return [fault for fault, found in checks.items() if found]


def is_finished(response: str) -> bool:
    """It ends with the end of a sentence, which the number of a list's item is not."""
    return bool(re.search(r"[.!?][\"')\]*]*$", response.strip())) and not re.search(r"(^|\s)\d+\.$", response.strip())


def is_on_topic(question: str, response: str) -> bool:
    """At least half of the question's content words are in the response, in any form."""
    asked = content_words(question)
    return bool(asked) and 2 * len(asked & content_words(response)) >= len(asked)


def is_echo(question: str, response: str) -> bool:
    """Fewer than five of its content words are not in the question."""
    return len(content_words(response) - content_words(question)) < FEWEST_WORDS


def repeats_itself(response: str) -> bool:
    """Some three words stand in it three times, or a sentence twice."""
    words = re.findall(r"\w+", response.lower())
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    sentences = Counter(s for s in re.split(r"[.!?\n]+\s*", response.lower()) if len(s.split()) > 2)
    return max(triples.values(), default=0) > 2 or max(sentences.values(), default=0) > 1


def content_words(text: str) -> set[str]:
    """The first five letters of its words of three letters and more, without the commonest words."""
    return {word[:5] for word in re.findall(r"[a-z]{3,}", text.lower()) if word not in STOP_WORDS.split()}


def label_all(link: str) -> int:
    """Labels on the page behind a person's link until nothing is left; returns how many it has labeled."""
    labeled = 0
    with httpx.Client(base_url=link, timeout=60, trust_env=False) as browser:
        state = browser.post("next").raise_for_status().json()
        while pair := state["pair"]:
            question = pair["messages"][-1]["content"]
            click = {"id": uuid.uuid4().hex, "shown": pair["id"]}
            click["choice"] = choice_of(question, *pair["responses"])
            state = browser.post("label", json=click).raise_for_status().json()
            labeled += 1
    return labeled
