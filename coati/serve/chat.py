"""`coati chat`: a conversation with a model on the terminal, or with two that are compared."""

import argparse
import json
import queue
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from coati.data.messages import Messages
from coati.errors import UserError
from coati.run_layout import model_folder, named_models
from coati.serve.protocol import ApiError, Wanted
from coati.serve.server import DTYPES, open_worker

HELP = """\
/undo           take back the last message and its response
/retry          another response to the last message
/save FILE      add the conversation to FILE, a row of SFT data
/set NAME VALUE temperature, top_p or max_tokens
/a, /b, /tie    with two models: which response was better; the conversation goes on from it
/help           this
/exit           leave"""
SETTINGS: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "max_tokens": int}
SIDES = ("a", "b")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="one or two: a model's folder, an adapter's, a run's, ..."
    )
    parser.add_argument("--system", help="a system message that the conversation begins with")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 for greedy (default: 1)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass (default: 1)")
    parser.add_argument("--max_tokens", type=int, help="longest response (default: what there is room for)")
    parser.add_argument("--seed", type=int, help="for the same responses again")
    parser.add_argument("--blind", action="store_true", help="don't say which of two models is which before a vote")
    parser.add_argument("--save_votes", type=Path, metavar="FILE", help="adds each vote as a row of preference data")
    parser.add_argument("--max_length", type=int, help="tokens of a conversation (default: as the model reads)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="float32 on a CPU, else that of the files")


@dataclass
class Conversation:
    """What was said.

    Attributes:
        messages: up to the last response that counts, or to the user's message while two responses wait for a vote.
        answers: these two, by side; else empty.
        order: which model is which side.
        wins: votes by model; ties are the rest of `votes`.
    """

    messages: Messages
    answers: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=lambda: [0, 1])
    wins: list[int] = field(default_factory=lambda: [0, 0])
    votes: int = 0
    responses: int = 0

    @property
    def last_message(self) -> int | None:
        """Where the user's last message is."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return places[-1] if places else None


class Chat:
    """Takes lines and answers them.

    Args:
        workers: one or two, which have started.
        show: prints a line; display: shows responses while they come, see `stream_one` and `stream_two`.
        votes: where votes go, if anywhere.
    """

    def __init__(
        self,
        workers: Sequence,
        wanted: Wanted,
        show: Callable[[str], Any],
        display: Callable[[list[str], Iterator[list[str]]], list[str]],
        *,
        system: str | None = None,
        blind: bool = False,
        votes: Path | None = None,
    ):
        self.workers, self.wanted, self.show, self.display = workers, wanted, show, display
        self.blind, self.votes = blind, votes
        self.random = random.Random(wanted.seed)
        self.said = Conversation([{"role": "system", "content": system}] if system else [])

    def run(self, lines: Iterator[str]):
        """Answers lines until there are no more, or one is /exit."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/exit":
                break
            try:
                if word.startswith("/"):
                    self.command(word, rest.strip())
                elif word:
                    self.say(line.strip())
            except (UserError, ApiError) as error:
                self.show(f"error: {error}")
            except KeyboardInterrupt:
                self.show("interrupted")
        if self.said.votes:
            ties = self.said.votes - sum(self.said.wins)
            wins = [f"{worker.name} {won}" for worker, won in zip(self.workers, self.said.wins, strict=True)]
            self.show(f"votes: {', '.join(wins)}, ties {ties}")

    def command(self, word: str, rest: str):
        if word == "/help":
            self.show(HELP)
        elif word == "/undo":
            self.undo()
        elif word == "/retry":
            self.retry()
        elif word == "/save":
            self.save(rest)
        elif word == "/set":
            self.change(rest)
        elif word in ("/a", "/b", "/tie"):
            self.vote(word[1:])
        else:
            raise UserError(f"there is no {word}: /help lists what there is")

    # --- a message and its response

    def say(self, text: str):
        """The user's message, and what the models respond to it."""
        if self.said.answers:
            raise UserError("which response was better? say /a, /b or /tie first")
        messages = [*self.said.messages, {"role": "user", "content": text}]
        self.respond(messages)

    def respond(self, messages: Messages):
        order = [0, 1]
        if self.blind:
            self.random.shuffle(order)
        order = order[: len(self.workers)]
        answers = self.display(self.labels(order), self.stream(messages, [self.workers[i] for i in order]))
        self.said.responses += 1
        self.said.messages, self.said.order = messages, order
        if len(answers) == 1:
            self.said.messages = [*messages, {"role": "assistant", "content": answers[0]}]
        else:
            self.said.answers = answers
            self.show("which was better? /a, /b or /tie")

    def labels(self, order: list[int]) -> list[str]:
        if len(order) == 1:
            return [self.workers[0].name]
        names = ["" if self.blind else f" ({self.workers[i].name})" for i in order]
        return [f"{side.upper()}{name}" for side, name in zip(SIDES, names, strict=True)]

    def stream(self, messages: Messages, workers: Sequence) -> Iterator[list[str]]:
        """The responses so far, by side, each time that there is more. Ctrl-C ends them where they are."""
        pieces: queue.SimpleQueue = queue.SimpleQueue()
        seed = self.wanted.seed
        wanted = replace(self.wanted, seed=None if seed is None else seed + self.said.responses)
        streams = []
        for side, worker in enumerate(workers):

            def emit(piece, side=side):
                pieces.put((side, piece))

            streams += worker.streams(worker.chat_prompt(messages), wanted, emit)
        for worker, stream in zip(workers, streams, strict=True):
            worker.submit([stream])
        texts, left = [""] * len(workers), len(workers)
        try:
            while left:
                side, piece = pieces.get()
                if not hasattr(piece, "text"):
                    raise UserError(f"the model has failed: {piece.message}")
                texts[side] += piece.text
                left -= piece.finish_reason is not None
                yield list(texts)
        except KeyboardInterrupt:
            yield list(texts)
        finally:
            for worker, stream in zip(workers, streams, strict=True):
                worker.cancel([stream])

    # --- commands

    def undo(self):
        last = self.said.last_message
        if last is None:
            raise UserError("there is no message to take back")
        self.said.messages, self.said.answers = self.said.messages[:last], []
        self.show("taken back")

    def retry(self):
        last = self.said.last_message
        if last is None:
            raise UserError("there is no message to respond to")
        self.said.answers = []
        self.respond(self.said.messages[: last + 1])

    def save(self, name: str):
        if not name:
            raise UserError("say where: /save FILE")
        if not self.said.messages or self.said.messages[-1]["role"] != "assistant":
            raise UserError("there is no response to save" + (" before a vote" if self.said.answers else ""))
        append(Path(name), {"messages": self.said.messages})
        self.show(f"saved to {name}")

    def change(self, rest: str):
        name, _, value = rest.partition(" ")
        if name not in SETTINGS:
            raise UserError(f"/set takes {', '.join(SETTINGS)} and a value")
        try:
            number = SETTINGS[name](value)
        except ValueError:
            raise UserError(f"{value!r} is no {name}") from None
        check_sampling({name: number})
        self.wanted = replace(self.wanted, **{name: number})

    def vote(self, word: str):
        if not self.said.answers:
            raise UserError("there are no two responses to vote on")
        answers, order = self.said.answers, self.said.order
        better = SIDES.index(word) if word in SIDES else 0
        if word in SIDES:
            if self.votes:
                names = [self.workers[order[side]].name for side in (better, 1 - better)]
                append(self.votes, preference_row(self.said.messages, answers[better], answers[1 - better], names))
            self.said.wins[order[better]] += 1
        self.said.votes += 1
        self.said.messages = [*self.said.messages, {"role": "assistant", "content": answers[better]}]
        self.said.answers = []
        if self.blind:
            self.show(", ".join(f"{s.upper()} was {self.workers[i].name}" for s, i in zip(SIDES, order, strict=True)))


def preference_row(prompt: Messages, chosen: str, rejected: str, names: Sequence[str]) -> dict[str, Any]:
    """A row of preference data, with the names of the models that gave the two responses."""
    sides = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    models = {"chosen_model": names[0], "rejected_model": names[1]}
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **models}


def append(path: Path, row: dict[str, Any]):
    """Adds a line to a .jsonl file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None


def check_sampling(values: dict[str, Any]):
    """Raises a UserError for a setting out of its range."""
    ranges = {"temperature": (0, 2), "top_p": (1e-6, 1), "max_tokens": (1, 2**31)}
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} {value:g} is not between {low:g} and {high:g}")


# --- the terminal


def visible(text: str) -> str:
    """Without control characters but line breaks and tabs: a response must not command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def stream_one(labels: list[str], texts: Iterator[list[str]], write: Callable[[str], Any]) -> list[str]:
    """Shows one response as it comes; returns it."""
    shown = ""
    for [text] in texts:
        write(text[len(shown) :])
        shown = text
    write("\n")
    return [shown]


def stream_plain(labels: list[str], texts: Iterator[list[str]], write: Callable[[str], Any]) -> list[str]:
    """Shows two responses one after the other, once both are there."""
    *_, whole = texts
    for label, text in zip(labels, whole, strict=True):
        write(f"{label}: {text}\n")
    return whole


def stream_columns(labels: list[str], texts: Iterator[list[str]], console) -> list[str]:
    """Shows two responses side by side as they come."""
    from rich.live import Live

    whole = [""] * len(labels)
    with Live(columns(labels, whole), console=console, vertical_overflow="visible") as live:
        for sides in texts:
            whole = sides
            live.update(columns(labels, whole))
    return whole


def columns(labels: list[str], sides: list[str]):
    """Two responses side by side, as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(expand=True)
    for label in labels:
        grid.add_column(label, ratio=1)
    grid.add_row(*(Text(visible(side)) for side in sides))
    return grid


def lines_of_terminal(console) -> Iterator[str]:
    """What the user types, until Ctrl-D or Ctrl-C."""
    import_module("readline")  # input() has a history with it

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def main(options: argparse.Namespace) -> int:
    """Chats on the terminal, or with what comes through a pipe.

    Raises:
        UserError: a model that can't be opened, or settings that contradict each other.
    """
    if len(options.models) > 2:
        raise UserError(f"coati chat takes one model or two, not {len(options.models)}")
    if len(options.models) == 1 and (options.blind or options.save_votes):
        raise UserError("--blind and --save_votes compare models: name two")
    check_sampling(vars(options))
    paths = named_models(options.models)
    for path in paths.values():
        model_folder(path)
    from rich.console import Console

    console = Console(highlight=False)
    options.slots, options.max_queue = 1, 1
    workers = [open_worker(name, path, options) for name, path in paths.items()]
    wanted = Wanted("", options.max_tokens, options.temperature, options.top_p, seed=options.seed, stream=True)
    is_typed = sys.stdin.isatty() and console.is_terminal

    def write(text: str):
        console.out(visible(text), end="")
        console.file.flush()

    def display(labels: list[str], texts: Iterator[list[str]]) -> list[str]:
        if len(labels) == 1:
            return stream_one(labels, texts, write)
        return stream_columns(labels, texts, console) if is_typed else stream_plain(labels, texts, write)

    talk = dict(system=options.system, blind=options.blind, votes=options.save_votes)
    chat = Chat(workers, wanted, console.out, display, **talk)
    if is_typed:
        console.out("/help lists commands, /exit leaves")
    chat.run(lines_of_terminal(console) if is_typed else sys.stdin)
    for worker in workers:
        worker.close()
    return 0
