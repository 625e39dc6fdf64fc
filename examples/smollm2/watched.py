"""Measures of responses that a reward model doesn't know of: rewards of weight 0, logged and not learned from."""

from coati.errors import UserError

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise UserError("the sentiment of responses needs a package: pip install --no-deps vaderSentiment==3.3.2") from None

ANALYZER = SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """How positive the words of each response are, from -1 to 1, by a lexicon (VADER, Hutto and Gilbert 2014)."""
    return [ANALYZER.polarity_scores(response)["compound"] for response in responses]


def words(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """How many words each response has."""
    return [float(len(response.split())) for response in responses]


def distinct(prompts: list[str], responses: list[str], **columns) -> list[float]:
    """The share of each response's words that it has not used before; 1 for a response without words."""
    split = [response.lower().split() for response in responses]
    return [len(set(words)) / len(words) if words else 1.0 for words in split]
