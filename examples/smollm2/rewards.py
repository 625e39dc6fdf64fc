"""Rewards that a program can verify: a stated sum, and constraints on a text in the manner of IFEval.

IFEval: Zhou et al. 2023, https://arxiv.org/abs/2311.07911. Each is 1 or 0, and none gives credit for a part.
"""

import json
import re

ANSWER = re.compile(r"Answer: (0|-?[1-9][0-9]*)")
STATEMENT = re.compile(r"\banswer\b", re.IGNORECASE)


def stated_answer(prompts: list[str], responses: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a response whose last line is `Answer: N` with the right integer, and which states no other, else 0.

    A response that repeats the question, lists numbers or states two answers commits itself to none, and gets 0.

    >>> stated_answer([""] * 3, ["Answer: 68", "23 + 45 = 68", "Answer: 67\\nAnswer: 68"], ["68"] * 3)
    [1.0, 0.0, 0.0]
    """
    return [float(final_answer(response) == right) for response, right in zip(responses, answer, strict=True)]


def final_answer(response: str) -> str | None:
    """The integer of the only answer that a response states, in its last line; None if there isn't one."""
    found = ANSWER.fullmatch(response.rstrip().rpartition("\n")[2])
    return found[1] if found and len(STATEMENT.findall(response)) == 1 else None


def at_most_words(response: str, most: int) -> bool:
    return len(response.split()) <= most


def includes(response: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) is not None


def avoids(response: str, word: str) -> bool:
    return word.lower() not in response.lower()  # not as a part of another word either


def lower_case(response: str) -> bool:
    return response == response.lower() and any(letter.islower() for letter in response)


def json_with_key(response: str, key: str) -> bool:
    """The whole response is one JSON object with this key alone, whose value is a text that isn't empty."""
    try:
        found = json.loads(response)
    except (ValueError, RecursionError):
        return False
    is_single = isinstance(found, dict) and list(found) == [key]
    return is_single and isinstance(found[key], str) and bool(found[key].strip())


def ends_with(response: str, phrase: str) -> bool:
    """The phrase ends the response and isn't all of it."""
    before = response.rstrip().removesuffix(phrase)
    return response.rstrip().endswith(phrase) and bool(before.strip())


VERIFIERS = {
    "at_most_words": at_most_words,
    "includes": includes,
    "avoids": avoids,
    "lower_case": lower_case,
    "json_with_key": json_with_key,
    "ends_with": ends_with,
}
LEAST_WORDS = 3  # fewer are no response; JSON and an ending have rules of their own


def constraints_met(prompts: list[str], responses: list[str], constraint: list[dict], **columns) -> list[float]:
    """1 for a response that meets its row's constraint, `{"name": ..., arguments}`, and has some words, else 0.

    A response that only copies the prompt's request gets 0 as well. Whether the words make sense is not checked:
    `check_constraints` in check.py measures their fluency apart from it.
    """
    rows = zip(prompts, responses, constraint, strict=True)
    return [float(is_response(prompt, response) and meets(response, rule)) for prompt, response, rule in rows]


def is_response(prompt: str, response: str) -> bool:
    """Some words, which aren't a passage of the prompt."""
    words = response.split()
    has_words = len(words) >= LEAST_WORDS or response.lstrip().startswith("{")
    return has_words and " ".join(words).lower() not in " ".join(prompt.split()).lower()


def meets(response: str, constraint: dict) -> bool:
    arguments = {name: value for name, value in constraint.items() if name != "name"}
    return VERIFIERS[constraint["name"]](response, **arguments)
