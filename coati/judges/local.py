"""A causal language model that judges in this process, in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coati.errors import UserError
from coati.judges.client import Question, Verdict
from coati.models.opened import open_model
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


class LocalJudge:
    """Begins the line of the verdict itself (`Score:`) and reads how probable it finds what may follow.

    A verdict is what the choices are worth, each weighted by its probability among the choices (G-Eval, 2303.16634,
    eq. 1: sum of p(s_i) s_i). Nothing in a question's text is read as a special token, so no response can end the
    question and speak as the judge.

    Args:
        path: folder of a model, an adapter, a run or a checkpoint.
        device: where it runs, in float32 on a CPU, else as its files have it.
        batch_size: questions per forward pass.

    Raises:
        UserError: it can't be opened.
    """

    def __init__(self, path: str, device: torch.device | str, batch_size: int = 16):
        device = torch.device(device)
        dtype = torch.float32 if device.type == "cpu" else None
        opened = open_model(model_folder(path, "judge"), dtype, device)
        self.actor, self.tokenizer, self.max_length = opened.actor, opened.tokenizer, opened.max_length
        self.path, self.device, self.batch_size = path, device, batch_size
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
        for start in range(0, len(fitting), self.batch_size):
            part = fitting[start : start + self.batch_size]
            found = self._read([rows[i] for i in part], [self._form(questions[i]) for i in part])
            for i, (value, mass) in zip(part, found, strict=True):
                verdicts[i] = Verdict(value, mass=mass)
        return [verdicts[i] for i in range(len(rows))]

    def _read(self, rows: Sequence[list[int]], forms: Sequence[Form]) -> list[tuple[float, float]]:
        """Of each row its verdict, and the probability that it goes on with a choice at all."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        last = upload([len(row) - 1 for row in rows], self.device)
        logits = self.actor.next_logits(to_device(ids, self.device), None, last=last).float()
        totals, found = logits.logsumexp(-1), []
        for row, form in enumerate(forms):
            chosen = logits[row, form.choices]
            mass = (chosen.logsumexp(0) - totals[row]).exp()
            found.append(torch.stack([chosen.softmax(0) @ form.worth, mass]))
        return [(value, mass) for value, mass in torch.stack(found).tolist()]  # one copy to the host

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
