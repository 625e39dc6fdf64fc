"""The lm-evaluation-harness task of one subject and kind of question, over our task files.

Requests are lm-eval's ordinary ones (`loglikelihood` of each way to write each letter; `generate_until`), so that any
of its models can answer them. Ours adds what needs a tokenizer: which ways of writing a letter are one token after the
prompt, and whether a prompt fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from colossal_eval.benchmarks.question import Question, read_questions
from colossal_eval.run.prompt_templates import ask, gap, heading, reply
from colossal_eval.scores import generated_text as answers
from colossal_eval.scores import metrics as scoring

STYLES = ("{}", " {}")


@dataclass
class Context:
    """A prompt that was built.

    Attributes:
        styles: how letters may be written after it.
        dropped: few-shot examples left out, since they did not fit.
        fits: False if the question doesn't fit even alone; it is not asked then and scores 0.
    """

    text: str
    styles: tuple[str, ...] = STYLES
    dropped: int = 0
    fits: bool = True


class QuestionTask(Task):
    """Questions of one subject and one kind.

    The configuration (from a generated YAML file) has `task`, `data` (the benchmark's folder), `subject`, `kind`,
    `title`, `methods` (some of "first_token", "generate", "choice_perplexity"), `num_fewshot` and `max_new_tokens`.

    Attributes:
        model: a `colossal_eval.run.harness_model.CoatiLM`, or None for any other of lm-eval's models.
        contexts: the prompts by question id, without their texts.
    """

    VERSION = 1
    OUTPUT_TYPE = "loglikelihood"

    def __init__(self, config: dict):
        self.settings = config
        self.subject, self.kind, self.methods = config["subject"], config["kind"], list(config["methods"])
        super().__init__(config=None)
        fields = {"task": config["task"], "num_fewshot": config["num_fewshot"], "metadata": config.get("metadata")}
        self._config = TaskConfig(**fields, output_type=self.OUTPUT_TYPE)
        self.model = None
        self.contexts: dict[str, Context] = {}

    def download(self, data_dir=None, cache_dir=None, download_mode=None):
        """Reads the task files; nothing is downloaded."""
        folder, name = Path(self.settings["data"]), f"{self.subject}.jsonl"
        self.questions = [asdict(q) for q in read_questions(folder / "test" / name) if q.kind == self.kind]
        shots = folder / "dev" / name
        found = (q for q in (read_questions(shots) if shots.is_file() else ()) if _alike(q.kind, self.kind))
        self.shots = list(islice(found, self.settings["num_fewshot"]))

    def has_training_docs(self):
        return False

    def has_validation_docs(self):
        return False

    def has_test_docs(self):
        return True

    def test_docs(self):
        return self.questions

    def doc_to_text(self, doc):
        return ask(Question(**doc))

    def doc_to_target(self, doc):
        return reply(Question(**doc)) if doc["solution"] or doc["kind"] != "math" else doc["answers"][0]

    # --- prompts

    def fewshot_context(self, doc, num_fewshot, apply_chat_template=False, chat_template=None, **kwargs):
        """The prompt with as many of the first examples as fit, whole ones. Kept in `contexts` without its text."""
        question = Question(**doc)
        template = chat_template if apply_chat_template else None
        room = self.settings["max_new_tokens"] if "generate" in self.methods else 1
        context = self._fitted(question, self.shots[:num_fewshot], room, partial(self._render, True, template))
        self.contexts[question.id] = Context("", context.styles, context.dropped, context.fits)
        return context.text

    def _fitted(self, question: Question, shots: list[Question], room: int, render) -> Context:
        """`render(question, shots)` with the most examples that leave `room` tokens for the answer."""
        for dropped in range(len(shots) + 1):
            text = render(question, shots[: len(shots) - dropped])
            if self.model is None:
                return Context(text)
            if self.model.fits(text, room):
                styles = self.model.letter_styles(text, tuple(question.labels)) if question.labels else STYLES
                return Context(text, styles, dropped)
        return Context(text, STYLES, len(shots), fits=False)

    def _render(self, listed: bool, template, question: Question, shots: list[Question]) -> str:
        head = heading(question, self.settings["title"])
        turns = [(ask(shot, listed), reply(shot, listed)) for shot in shots]
        if template is None:
            shown = "".join(f"{text}{gap(question)}{answer}\n\n" for text, answer in turns)
            return f"{head}\n\n{shown}{ask(question, listed)}" if head else shown + ask(question, listed)
        turns.append((ask(question, listed), None))
        # a system turn is what some templates refuse
        turns[0] = (f"{head}\n\n{turns[0][0]}" if head else turns[0][0], turns[0][1])
        messages = []
        for text, answer in turns:
            messages.append({"role": "user", "content": text})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return template(messages, add_generation_prompt=True)

    # --- requests

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        """The letters' log-probs, then the generated text, then the choices' texts: what `methods` asks for."""
        question, context = Question(**doc), self.contexts[doc["id"]]
        made: list[tuple[str, tuple]] = []
        if not context.fits:
            return self._instances_of([("unanswered", ("",))], doc, kwargs)
        if "first_token" in self.methods:
            made += [
                ("loglikelihood", (ctx, style.format(label))) for label in question.labels for style in context.styles
            ]
        if "generate" in self.methods:
            until = ["\n\n", "Question:", "题目："] if question.kind == "math" else ["\n\n"]
            settings = {"until": until, "max_gen_toks": self.settings["max_new_tokens"], "temperature": 0.0}
            made.append(("generate_until", (ctx, settings | {"do_sample": False})))
        if "choice_perplexity" in self.methods and question.choices:
            template = chat_template if apply_chat_template else None
            room = max(map(self.model.count, question.choices)) + 2 if self.model else 0
            shots = [shot for shot in self.shots if shot.choices]
            plain = self._fitted(question, shots, room, partial(self._render, False, template))
            made += [("loglikelihood", (plain.text, gap(question) + text)) for text in question.choices if plain.fits]
        # lm-eval wants a request of every question
        return self._instances_of(made or [("unanswered", ("",))], doc, kwargs)

    @staticmethod
    def _instances_of(made: list[tuple[str, tuple]], doc: dict, kwargs: dict) -> list[Instance]:
        return [
            Instance(request_type=kind, doc=doc, arguments=arguments, idx=i, **kwargs)
            for i, (kind, arguments) in enumerate(made)
        ]

    # --- scores

    def process_results(self, doc, results):
        """Scores by name; each question of a task has the same names."""
        question, context = Question(**doc), self.contexts[doc["id"]]
        results = [result for result in results if result is not None]
        scores: dict[str, float] = {}
        if "first_token" in self.methods:
            right, width = question.labels.index(question.answers[0]), len(context.styles)
            count = len(question.labels) * width
            found = [log_prob for log_prob, _ in results[:count]]
            results = results[count:]
            log_probs = scoring.choice_log_probs([found[i : i + width] for i in range(0, len(found), width)])
            scores["first_token"] = scoring.first_token(log_probs, right) if found else 0.0
        if "generate" in self.methods:
            text = results.pop(0) if context.fits else ""
            scores["exact_match"] = judge_text(question, text)
            if self.kind == "math":
                scores["last_number"] = float(answers.same_number(text, question.answers, stated=False))
            if "first_token" in scores:
                scores["combined"] = scoring.combined(scores["exact_match"], scores["first_token"])
        if "choice_perplexity" in self.methods:
            scores["choice_perplexity"] = self._by_text(question, results) if results else 0.0
        return scores

    def _by_text(self, question: Question, results) -> float:
        tokens = [self.model.count(gap(question) + text) if self.model else len(text) for text in question.choices]
        right = question.labels.index(question.answers[0])
        return scoring.choice_perplexity([log_prob for log_prob, _ in results], [max(1, n) for n in tokens], right)

    def aggregation(self):
        return dict.fromkeys(self._names(), mean)

    def higher_is_better(self):
        return dict.fromkeys(self._names(), True)

    def _names(self) -> list[str]:
        names = {"first_token": "first_token", "generate": "exact_match", "choice_perplexity": "choice_perplexity"}
        more = ["combined"] if {"first_token", "generate"} <= set(self.methods) else []
        return [names[method] for method in self.methods] + more + ["last_number"] * (self.kind == "math")


class TextTask(QuestionTask):
    """Documents that are read whole: nothing is asked, and what counts is the nats a byte."""

    OUTPUT_TYPE = "loglikelihood_rolling"

    def doc_to_target(self, doc):
        return ""

    def fewshot_context(self, doc, num_fewshot, apply_chat_template=False, chat_template=None, **kwargs):
        self.contexts[doc["id"]] = Context("")
        return ""

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        return self._instances_of([("loglikelihood_rolling", (doc["question"],))], doc, kwargs)

    def process_results(self, doc, results):
        return {"nats_per_byte": -results[0] / scoring.size(doc["question"])}

    def higher_is_better(self):
        return dict.fromkeys(self._names(), False)

    def _names(self) -> list[str]:
        return ["nats_per_byte"]


def _alike(shot: str, kind: str) -> bool:
    """Examples with one right letter serve for questions with several, and the other way round."""
    return shot == kind or (shot.endswith("choice") and kind.endswith("choice"))


def judge_text(question: Question, text: str) -> float:
    """What a generated text is worth for a question of any kind, 0 to 1."""
    if question.kind == "math":
        return float(answers.same_number(text, question.answers))
    if question.kind == "cloze":
        return float(answers.same_text(text, question.answers))
    given = answers.extract_letters(text, question.labels)
    if question.kind == "multi_choice":
        return scoring.multi_choice(given, question.answers, question.labels)
    return scoring.exact_match(given, question.answers)
