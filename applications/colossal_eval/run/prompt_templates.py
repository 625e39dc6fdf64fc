"""What a model reads: English and Chinese templates. A prompt ends where the answer begins."""

from __future__ import annotations

from dataclasses import dataclass

from colossal_eval.benchmarks.question import Question


@dataclass(frozen=True)
class Template:
    """The words around a question.

    Attributes:
        head: before the first question, by kind, with `{title}` for the subject's name.
        ask, reply: before the question, and before its answer.
        gap: between a prompt and its answer, in few-shot examples.
    """

    head: dict[str, str]
    ask: str
    reply: str
    gap: str


ENGLISH = Template(
    head={
        "single_choice": "The following are multiple choice questions (with answers) about {title}.",
        "multi_choice": "The following are multiple choice questions (with answers) about {title}. "
        "Several choices may be right.",
        "cloze": "The following are questions (with answers) about {title}.",
        "math": "",
    },
    ask="Question: ",
    reply="Answer:",
    gap=" ",
)
CHINESE = Template(
    head={
        "single_choice": "以下是关于{title}的单项选择题，请直接给出正确答案的选项。",
        "multi_choice": "以下是关于{title}的多项选择题，请直接给出所有正确答案的选项。",
        "cloze": "以下是关于{title}的填空题，请直接给出答案。",
        "math": "以下是关于{title}的数学题，请逐步推理，最后在“####”后给出答案。",
    },
    ask="题目：",
    reply="答案是：",
    gap="",
)
TEMPLATES = {"en": ENGLISH, "zh": CHINESE}


def heading(question: Question, title: str) -> str:
    """What stands before the first question; empty for GSM8K."""
    return TEMPLATES[question.language].head[question.kind].format(title=title)


def ask(question: Question, listed: bool = True) -> str:
    """The question up to where its answer begins; with `listed` its choices, one per line."""
    template = TEMPLATES[question.language]
    lines = [question.passage] if question.passage else []
    lines.append(template.ask + question.question)
    if listed:
        lines += [f"{label}. {text}" for label, text in zip(question.labels, question.choices, strict=False)]
    return "\n".join([*lines, template.reply])


def reply(question: Question, listed: bool = True) -> str:
    """The right answer as an example shows it: letters, the choice's text if not `listed`, or the reasoning."""
    if question.kind == "math":
        return f"{question.solution}\n#### {question.answers[0]}"
    if not listed and question.choices:
        return question.choices[question.labels.index(question.answers[0])]
    return "".join(question.answers) if question.labels else question.answers[0]


def gap(question: Question) -> str:
    """What stands between prompt and answer."""
    return TEMPLATES[question.language].gap
