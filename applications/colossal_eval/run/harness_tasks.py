"""The lm-evaluation-harness task of one subject and kind of question, over our task files.

Requests are lm-eval's ordinary ones (`loglikelihood` of each way to write each letter; `generate_until`), so that any
of its models can run them. Ours adds what needs a tokenizer: which ways of writing a letter are one token after the
prompt, and whether a prompt fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from colossal_eval.benchmarks.prepared_folder import read_questions
from colossal_eval.benchmarks.question import Question
from colossal_eval.run.prompt_templates import ask, gap, heading, reply
from colossal_eval.run.prompt_tokenizer import PromptTokenizer
from colossal_eval.scores import metrics
from colossal_eval.scores.generated_text import same_number, score_text

STYLES = ("{}", " {}")


@dataclass
class Context:
    """A prompt that was built.

    Attributes:
        styles: how letters may be written after it.
        dropped: few-shot examples skipped, since they did not fit.
        fits: False if the question doesn't fit even alone; it is not asked then and scores 0.
    """

    text: str
    styles: tuple[str, ...] = STYLES
    dropped: int = 0
    fits: bool = True


@dataclass
class ModelOutput:
    """A model's output for a question, by method; empty for a question that was not asked.

    Attributes:
        letters: log-probs of the choices' letters, in nats.
        text: the generated text.
        choices: log-probs of the choices' texts, in nats.
    """

    letters: list[float] = field(default_factory=list)
    text: str = ""
    choices: list[float] = field(default_factory=list)


class QuestionTask(Task):
    """Questions of one subject and one kind.

    The configuration (from a generated YAML file) has `task`, `data` (the benchmark's folder), `subject`, `kind`,
    `title`, `methods` (some of "first_token", "generate", "choice_perplexity"), `num_fewshot` and `max_new_tokens`.

    Attributes:
        prompt_tokenizer: the model's; None for lm-eval's own models, for which prompts are never shortened.
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
        self.prompt_tokenizer: PromptTokenizer | None = None
        self.contexts: dict[str, Context] = {}

    def download(self, data_dir=None, cache_dir=None, download_mode=None):
        """Reads the task files; nothing is downloaded."""
        folder, name = Path(self.settings["data"]), f"{self.subject}.jsonl"
        self.questions = [asdict(q) for q in read_questions(folder / "test" / name) if q.kind == self.kind]
        self.shots: list[Question] = []
        if (folder / "dev" / name).is_file():
            alike = (q for q in read_questions(folder / "dev" / name) if _alike(q.kind, self.kind))
            self.shots = list(islice(alike, self.settings["num_fewshot"]))

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
        if doc["kind"] == "math" and not doc["solution"]:
            return doc["answers"][0]
        return reply(Question(**doc))

    # --- prompts

    def fewshot_context(self, doc, num_fewshot, apply_chat_template=False, chat_template=None, **kwargs):
        """The prompt with as many of the first examples as fit, whole ones. Kept in `contexts` without its text."""
        question = Question(**doc)
        template = chat_template if apply_chat_template else None
        room = self.settings["max_new_tokens"] if "generate" in self.methods else 1
        context = self._fitted(question, self.shots[:num_fewshot], room, template)
        self.contexts[question.id] = replace(context, text="")
        return context.text

    def _fitted(self, question: Question, shots: list[Question], room: int, template, listed: bool = True) -> Context:
        """The prompt with the most examples that leave `room` tokens for the response."""
        tokenizer = self.prompt_tokenizer
        for dropped in range(len(shots) + 1):
            text = self._prompt(question, shots[: len(shots) - dropped], template, listed)
            if tokenizer is None:
                return Context(text)
            if tokenizer.fits(text, room):
                styles = tokenizer.letter_styles(text, tuple(question.labels)) if question.labels else STYLES
                return Context(text, styles, dropped)
        return Context(text, STYLES, len(shots), fits=False)

    def _prompt(self, question: Question, shots: list[Question], template, listed: bool) -> str:
        head = heading(question, self.settings["title"])
        if template is None:
            shown = "".join(f"{ask(shot, listed)}{gap(question)}{reply(shot, listed)}\n\n" for shot in shots)
            text = shown + ask(question, listed)
            return f"{head}\n\n{text}" if head else text
        prompts = [ask(shot, listed) for shot in [*shots, question]]
        if head:  # a system turn is what some templates refuse
            prompts[0] = f"{head}\n\n{prompts[0]}"
        messages = []
        for text, shot in zip(prompts[:-1], shots, strict=True):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": reply(shot, listed)})
        messages.append({"role": "user", "content": prompts[-1]})
        return template(messages, add_generation_prompt=True)

    # --- requests

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        """The letters' log-probs, then the generated text, then the choices' texts: what `methods` asks for."""
        question, context = Question(**doc), self.contexts[doc["id"]]
        requests: list[tuple[str, tuple]] = []
        if context.fits and "first_token" in self.methods:
            requests += [
                ("loglikelihood", (ctx, style.format(label))) for label in question.labels for style in context.styles
            ]
        if context.fits and "generate" in self.methods:
            until = ["\n\n", "Question:", "题目："] if question.kind == "math" else ["\n\n"]
            settings = {"until": until, "max_gen_toks": self.settings["max_new_tokens"], "temperature": 0.0}
            requests.append(("generate_until", (ctx, settings | {"do_sample": False})))
        if context.fits and "choice_perplexity" in self.methods and question.choices:
            requests += self._choice_requests(question, chat_template if apply_chat_template else None)
        # lm-eval wants a request for every question
        return self._instances_of(requests or [("unanswered", ("",))], doc, kwargs)

    def _choice_requests(self, question: Question, template) -> list[tuple[str, tuple]]:
        """Each choice's text after a prompt that does not list the choices; none if that does not fit."""
        room = 0
        if self.prompt_tokenizer is not None:
            room = max(map(self.prompt_tokenizer.count, question.choices)) + 2
        shots = [shot for shot in self.shots if shot.choices]
        context = self._fitted(question, shots, room, template, listed=False)
        if not context.fits:
            return []
        return [("loglikelihood", (context.text, gap(question) + text)) for text in question.choices]

    @staticmethod
    def _instances_of(requests: list[tuple[str, tuple]], doc: dict, kwargs: dict) -> list[Instance]:
        return [
            Instance(request_type=kind, doc=doc, arguments=arguments, idx=i, **kwargs)
            for i, (kind, arguments) in enumerate(requests)
        ]

    # --- scores

    def model_output(self, question: Question, results: list) -> ModelOutput:
        """The model's output, from the results of the requests of `construct_requests`."""
        output, results = ModelOutput(), [result for result in results if result is not None]
        if not results:
            return output
        if "first_token" in self.methods:
            width = len(self.contexts[question.id].styles)
            count = len(question.labels) * width
            log_probs = [log_prob for log_prob, _ in results[:count]]
            output.letters = metrics.choice_log_probs([log_probs[i : i + width] for i in range(0, count, width)])
            results = results[count:]
        if "generate" in self.methods:
            output.text, results = results[0], results[1:]
        output.choices = [log_prob for log_prob, _ in results]
        return output

    def process_results(self, doc, results):
        """Scores by name; each question of a task has the same names."""
        question = Question(**doc)
        output = self.model_output(question, results)
        scores: dict[str, float] = {}
        if "first_token" in self.methods:
            right = question.labels.index(question.answers[0])
            scores["first_token"] = metrics.first_token(output.letters, right) if output.letters else 0.0
        if "generate" in self.methods:
            scores["exact_match"] = score_text(question, output.text)
            if self.kind == "math":
                scores["last_number"] = float(same_number(output.text, question.answers, style="anywhere"))
            if "first_token" in scores:
                scores["combined"] = metrics.combined(scores["exact_match"], scores["first_token"])
        if "choice_perplexity" in self.methods:
            scores["choice_perplexity"] = self._by_perplexity(question, output.choices) if output.choices else 0.0
        return scores

    def _by_perplexity(self, question: Question, log_probs: list[float]) -> float:
        if self.prompt_tokenizer is None:
            lengths = [len(text) for text in question.choices]
        else:
            lengths = [self.prompt_tokenizer.count(gap(question) + text) for text in question.choices]
        right = question.labels.index(question.answers[0])
        return metrics.choice_perplexity(log_probs, [max(1, length) for length in lengths], right)

    def aggregation(self):
        return dict.fromkeys(self._names(), mean)

    def higher_is_better(self):
        return dict.fromkeys(self._names(), True)

    def _names(self) -> list[str]:
        names = ["exact_match" if method == "generate" else method for method in self.methods]
        if "first_token" in self.methods and "generate" in self.methods:
            names.append("combined")
        if self.kind == "math":
            names.append("last_number")
        return names


class TextTask(QuestionTask):
    """Documents that are read whole: nothing is asked, and what counts is the nats per byte."""

    OUTPUT_TYPE = "loglikelihood_rolling"

    def doc_to_target(self, doc):
        return ""

    def fewshot_context(self, doc, num_fewshot, apply_chat_template=False, chat_template=None, **kwargs):
        self.contexts[doc["id"]] = Context("")
        return ""

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        return self._instances_of([("loglikelihood_rolling", (doc["question"],))], doc, kwargs)

    def process_results(self, doc, results):
        return {"nats_per_byte": -results[0] / metrics.utf8_bytes(doc["question"])}

    def higher_is_better(self):
        return dict.fromkeys(self._names(), False)

    def _names(self) -> list[str]:
        return ["nats_per_byte"]


def _alike(shot: str, kind: str) -> bool:
    """Examples with one right letter serve for questions with several, and the other way round."""
    return shot == kind or (shot.endswith("choice") and kind.endswith("choice"))
