"""Is the last number of a response the right one?"""


def correct(prompts: list[str], responses: list[str], answer: list[str], **columns) -> list[float]:
    """1 for a response whose last `=` is followed by `answer`, else 0."""
    return [float(response.rpartition("=")[2] == right) for response, right in zip(responses, answer, strict=True)]
