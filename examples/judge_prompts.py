"""Prompts for a model that learns to judge: each pair of responses in both orders, with the verdict that is right
(J1, 2505.10320, learns from such by GRPO: the verdict is verified, what is thought before it is free).

    python examples/judge_prompts.py --pairs pairs.jsonl --output judge.jsonl

docs/rewards.md has the reward, and how the model becomes a judge.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.config import Settings, option, parse_config, settings
from coati.data import load_rows, parse_record
from coati.data.records import PreferenceRecord
from coati.errors import UserError
from coati.files import atomic_write
from coati.judges.questions import ask_better, pairwise_template, read_template


@settings
class JudgePromptsConfig(Settings):
    """Settings of the prompts."""

    pairs: str = option(..., "rows with a chosen and a rejected response", path="data")
    output: str = option(..., "file of the prompts", path="output")
    prompt: str | None = option(
        None,
        "what the judge is asked: a file, or a text with {prompt}, {response_a} and {response_b}, as the reward judge "
        "has it; ours if not given",
    )
    reasons: bool = option(
        True,
        "ask for reasons before the verdict, as judges at endpoints are asked; False: for the verdict alone, as judges "
        "of a path are, and with it as the row's completion, for SFT",
    )


def text_of(messages: list[dict]) -> str:
    """What a judge reads of a dialogue: a single message as it is, else each after its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def rows_of(pair: PreferenceRecord, template: str, with_completion: bool = False) -> Iterator[dict]:
    """Two rows, with the chosen response once as A and once as B, so that no position is right more often.

    Args:
        template: what is asked, with {prompt}, {response_a} and {response_b}.
        with_completion: the verdict is the row's completion too.
    """
    prompt, chosen, rejected = map(text_of, (pair.prompt, pair.chosen, pair.rejected))
    for first, second, answer in ((chosen, rejected, "A"), (rejected, chosen, "B")):
        question = ask_better(template, first, second, prompt=prompt)
        row = {"prompt": list(question.messages), "answer": answer}
        yield row | {"completion": f"{question.opening} {answer}"} if with_completion else row


def read_pairs(source: str) -> Iterator[PreferenceRecord]:
    """Pairs, and ties, which have no better response.

    Raises:
        UserError: a row is no pair; it names file and line.
    """
    for line, row in load_rows(source):
        try:
            if isinstance(row, ValueError):
                raise row
            yield from parse_record(row, "comparison")
        except ValueError as error:
            raise UserError(f"{source}, line {line}: {error}") from None


def main():
    config = parse_config(JudgePromptsConfig, sys.argv[1:], __doc__.splitlines()[0])
    pairs = list(read_pairs(config.pairs))
    decided = [pair for pair in pairs if not pair.tie]
    template = pairwise_template(config.reasons)
    if config.prompt is not None:
        template = read_template(config.prompt, ("response_a", "response_b"))
    rows = [row for pair in decided for row in rows_of(pair, template, not config.reasons)]
    with atomic_write(Path(config.output)) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts of {len(decided)} pairs in {config.output}; {len(pairs) - len(decided)} ties left out")


if __name__ == "__main__":
    main()
