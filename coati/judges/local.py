"""A causal language model that judges in the run's own processes, in one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coati.errors import UserError
from coati.judges.client import Question, Verdict
from coati.models import Actor
from coati.models.opened import OpenedModel, open_model
from coati.run_layout import model_folder
from coati.transfer import to_device, upload

CONTENT = "\N{INVISIBLE SEPARATOR}content\N{INVISIBLE SEPARATOR}"  # stands for a question's text in the chat template


@dataclass(frozen=True)
class Form:
    """How a question of a kind ends in tokens.

    Attributes:
        tail: what follows the question's text, up to the choice.
        choices: the token of each choice, long `[choices]`; worth: its number, float32 `[choices]`.
    """

    tail: list[int]
    choices: Tensor
    worth: Tensor


@dataclass(frozen=True)
class Rows:
    """Questions of one forward pass.

    Attributes:
        ids: the tokens of each; choices: the tokens that may follow them, long `[choices]` each.
    """

    ids: list[list[int]]
    choices: list[Tensor]


class ChoiceReader(Protocol):
    """Reads a judge's model."""

    def __call__(self, batches: Sequence[Rows]) -> list[Tensor]:
        """Log-probs of the choices after each row, float32 `[choices]`, of all batches in order."""


class WholeModel:
    """A `ChoiceReader` of a model that this process has unsharded."""

    def __init__(self, actor: Actor, device: torch.device):
        self.actor, self.device = actor, device

    def __call__(self, batches: Sequence[Rows]) -> list[Tensor]:
        return [log_probs for rows in batches for log_probs in self._read(rows)]

    def _read(self, rows: Rows) -> list[Tensor]:
        ids = pad_sequence([torch.tensor(row) for row in rows.ids], batch_first=True)
        last = upload([len(row) - 1 for row in rows.ids], self.device)
        log_probs = self.actor.next_logits(to_device(ids, self.device), None, last=last).float().log_softmax(-1)
        return [log_probs[i, choices] for i, choices in enumerate(rows.choices)]


class SharedModel:
    """A `ChoiceReader` of a model that several processes share, each with a part of it. They call it at the same time.

    Args:
        forward_all: gives what an `Actor` gives for each of several micro-batches, which are keywords of its forward
            (`Engine.forward_all`).
        ranks: the processes that have questions of their own; all do as many forward passes.
    """

    def __init__(self, forward_all: Callable[[Sequence[dict]], list], ranks: Any, device: torch.device):
        self.forward_all, self.ranks, self.device = forward_all, ranks, device

    def __call__(self, batches: Sequence[Rows]) -> list[Tensor]:
        filler = Rows([[0]], [upload([0], self.device)])
        missing = max(self.ranks.gather(len(batches))) - len(batches)
        outputs = self.forward_all([self._inputs(rows) for rows in [*batches, *[filler] * missing]])
        return [
            log_probs[row, len(ids), : len(choices)]
            for rows, (_, log_probs) in zip(batches, outputs[: len(batches)], strict=True)
            for row, (ids, choices) in enumerate(zip(rows.ids, rows.choices, strict=True))
        ]

    def _inputs(self, rows: Rows) -> dict[str, Any]:
        """Keywords of an `Actor`'s forward. It tells how probable tokens in the place of one that is there are, so each
        row gets a further one."""
        ids = pad_sequence([torch.tensor([*row, 0]) for row in rows.ids], batch_first=True)
        place = torch.arange(ids.shape[1])
        lengths = torch.tensor([[len(row)] for row in rows.ids])
        choices = pad_sequence(rows.choices, batch_first=True)
        return {
            "input_ids": to_device(ids, self.device),
            "attention_mask": to_device(place <= lengths, self.device),
            "right_padded": True,
            "targets": to_device(place == lengths, self.device),
            "head_ids": choices[:, None].expand(-1, ids.shape[1], -1),
        }


class LocalJudge:
    """Begins the line of the verdict itself (`Score:`) and reads how probable it finds what may follow.

    A verdict is what the choices are worth, each weighted by its probability among the choices (G-Eval, 2303.16634,
    eq. 1: sum of p(s_i) s_i). Nothing in a question's text is read as a special token, so no response can end the
    question and speak as the judge.

    Args:
        path: the model's folder, for messages.
        opened: its tokenizer, and the longest row; read: its model.
        device: where choices are kept.
        batch_size: questions per forward pass.

    Raises:
        UserError: its chat template can't write a question.
    """

    def __init__(
        self, path: str, opened: OpenedModel, read: ChoiceReader, device: torch.device | str, batch_size: int = 16
    ):
        self.tokenizer, self.max_length, self.read = opened.tokenizer, opened.max_length, read
        self.path, self.device, self.batch_size = path, torch.device(device), batch_size
        self.head, self.after = self._around_content()
        self.forms: dict[tuple[str, ...], Form] = {}

    @property
    def place(self) -> str:
        """Where it is asked, for messages."""
        return f"the judge in {self.path}"

    def check(self, question: Question):
        """Raises a UserError if the choices of such questions can't be told apart by one token."""
        self._form(question)

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts with what their choices were worth; a question that is too long for the model has none."""
        rows = [self._tokens(question) for question in questions]
        fits = [len(row) <= self.max_length for row in rows]
        verdicts = {i: Verdict(None, errors=(self._too_long(row),)) for i, row in enumerate(rows) if not fits[i]}
        fitting = sorted((i for i in range(len(rows)) if fits[i]), key=lambda i: -len(rows[i]))
        parts = [fitting[start : start + self.batch_size] for start in range(0, len(fitting), self.batch_size)]
        log_probs = self.read(
            [Rows([rows[i] for i in part], [self._form(questions[i]).choices for i in part]) for part in parts]
        )
        found = [
            torch.stack([chosen.softmax(0) @ self._form(questions[i]).worth, chosen.exp().sum()])
            for i, chosen in zip(fitting, log_probs, strict=True)
        ]
        if found:
            for i, (value, mass) in zip(fitting, torch.stack(found).tolist(), strict=True):  # one copy to the host
                verdicts[i] = Verdict(value, mass=mass)
        return [verdicts[i] for i in range(len(rows))]

    # --- tokens

    def _around_content(self) -> tuple[list[int], str]:
        """The tokens before a question's text, and the text after it, up to the reply."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], "\n"
        messages = [{"role": "user", "content": CONTENT}]
        # no thoughts before a verdict, from models whose template knows that setting
        how = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
        before, mark, after = tokenizer.apply_chat_template(messages, **how).partition(CONTENT)
        if not mark or CONTENT in after:
            raise UserError(f"the chat template of {self.place} doesn't write a user's message once, as it is")
        return self._encode(before), after

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tokens(self, question: Question) -> list[int]:
        [message] = question.messages
        content = self.tokenizer(message["content"].strip(), add_special_tokens=False, split_special_tokens=True)
        return self.head + content["input_ids"] + self._form(question).tail

    def _form(self, question: Question) -> Form:
        key = (question.opening, *question.choices)
        if key not in self.forms:
            self.forms[key] = self._make_form(question)
        return self.forms[key]

    def _make_form(self, question: Question) -> Form:
        begun = self.after + question.opening
        whole = [self._encode(f"{begun} {choice}") for choice in question.choices]
        for tail in (self._encode(begun), self._encode(f"{begun} ")):  # the space belongs to the choice, or doesn't
            chosen = [ids[-1] for ids in whole]
            if len(set(chosen)) == len(chosen) > 1 and all(ids[:-1] == tail for ids in whole):
                worth = upload(list(question.choices.values()), self.device, torch.float32)
                return Form(tail, upload(chosen, self.device), worth)
        raise UserError(
            f"the tokenizer of {self.place} doesn't write {', '.join(question.choices) or 'the verdicts'} after "
            f"{question.opening!r} as one token each: give a score's ends as whole numbers from 0 to 9 (lowest_score, "
            "highest_score), or choose another judge"
        )

    def _too_long(self, row: list[int]) -> str:
        return f"the question has {len(row)} tokens, and {self.place} reads {self.max_length}"


def load_judge(path: str, device: torch.device | str, batch_size: int = 16) -> LocalJudge:
    """A judge that is whole in this process, in float32 on a CPU, else as its files have it.

    Args:
        path: folder of a model, an adapter, a run or a checkpoint.
        batch_size: questions per forward pass.

    Raises:
        UserError: it can't be opened.
    """
    device = torch.device(device)
    opened = open_model(model_folder(path, "judge"), torch.float32 if device.type == "cpu" else None, device)
    return LocalJudge(path, opened, WholeModel(opened.actor, device), device, batch_size)
