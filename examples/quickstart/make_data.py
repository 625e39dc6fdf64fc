"""Write the quickstart's data and tokenizer: a shop's customers ask; a good reply is polite and on topic.

    python examples/quickstart/make_data.py --out runs/quickstart/data --seed 0

Half of the replies in `sft.jsonl` are bad (rude, off topic, or both), so that reinforcement learning has
something left to do after supervised fine-tuning. The evaluation files hold messages about pairs of color and
item that no training file contains. The same seed gives the same bytes.
"""

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

import yaml

SIZES = {
    "sft": 6000,
    "sft_eval": 200,
    "preference_train": 6000,
    "preference_eval": 500,
    "prompts_train": 2000,
    "prompts_eval": 200,
}
VOCAB_SIZE = 512
PHRASES = Path(__file__).with_name("phrases.yaml")


class Shop:
    """Draws messages and replies from the phrase book with one random generator.

    `pairs` are the (color, item) pairs that messages may be about.
    """

    def __init__(self, rng: random.Random, book: dict, pairs: list[tuple[str, str]]) -> None:
        self.rng, self.book, self.pairs = rng, book, pairs

    def fill(self, phrase: str) -> str:
        """`phrase` with its slots filled at random."""
        color, item = self.rng.choice(self.pairs)
        day, name = self.rng.choice(self.book["days"]), self.rng.choice(self.book["names"])
        return phrase.format(color=color, item=item, day=day, name=name)

    def message(self) -> tuple[str, str]:
        """A topic and a customer's message about it."""
        topic = self.rng.choice(list(self.book["topics"]))
        greeting = self.rng.choice(self.book["greetings"])
        ask = self.rng.choice(self.book["topics"][topic]["asks"])
        return topic, self.fill(f"{greeting} {ask}".strip())

    def reply(self, topic: str | None, tone: str) -> str:
        """A reply in `tone` ("polite" or "rude"), which shows before or after the answer.

        Without a topic the answer is small talk or an empty politeness: a reward model that has never seen
        "We are happy to help. We are happy to help." rejected takes it for the best reply of all.
        """
        empty = self.book["small_talk"] + self.book["polite_openers"] + self.book["polite_closers"]
        answers = self.book["topics"][topic]["answers"] if topic else empty
        answer = self.rng.choice(answers)
        if self.rng.random() < 0.5:
            text = f"{self.rng.choice(self.book[tone + '_openers'])} {answer}"
        else:
            text = f"{answer} {self.rng.choice(self.book[tone + '_closers'])}"
        return self.fill(text)

    def good_reply(self, topic: str) -> str:
        return self.reply(topic, "polite")

    def bad_reply(self, topic: str) -> str:
        """A reply that is rude (two in four), off topic, or both (one in four each)."""
        return self.reply(*self.rng.choice([(topic, "rude"), (topic, "rude"), (None, "polite"), (None, "rude")]))

    def curt_reply(self, topic: str) -> str:
        """One or two answers, without a polite word."""
        answers = self.book["topics"][topic]["answers"]
        return self.fill(" ".join(self.rng.choices(answers, k=self.rng.choice([1, 2]))))

    def broken_reply(self, topic: str) -> str:
        """A good reply that lost a few letters, as a small model's replies do."""
        text = self.good_reply(topic)
        start, length = self.rng.randrange(len(text) - 8), self.rng.randint(2, 8)
        return text[:start] + text[start + length :]

    def rejected_reply(self, topic: str) -> str:
        """A bad reply, a polite one about another topic, a curt one or a broken one.

        What the reward model has never seen rejected, PPO finds: replies like the last two once scored best.
        """
        other = self.rng.choice([name for name in self.book["topics"] if name != topic])
        kinds = [
            (3, lambda: self.bad_reply(topic)),
            (3, lambda: self.good_reply(other)),
            (1, lambda: self.curt_reply(topic)),
            (1, lambda: self.broken_reply(topic)),
        ]
        weights, replies = zip(*kinds, strict=True)
        return self.rng.choices(replies, weights)[0]()

    def messages(self, count: int) -> Iterator[tuple[str, str]]:
        """`count` messages, no two of them alike, with their topics."""
        seen = set()
        while len(seen) < count:
            topic, text = self.message()
            if text not in seen:
                seen.add(text)
                yield topic, text

    def sft(self, count: int) -> Iterator[dict]:
        for number, (topic, text) in enumerate(self.messages(count)):
            reply = (self.good_reply, self.bad_reply)[number % 2](topic)
            yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}

    def preferences(self, count: int) -> Iterator[dict]:
        for topic, text in self.messages(count):
            yield {"prompt": text, "chosen": self.good_reply(topic), "rejected": self.rejected_reply(topic)}

    def prompts(self, count: int) -> Iterator[dict]:
        for _, text in self.messages(count):
            yield {"prompt": text}


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder next to `path`, then move it there, so that no half of it is ever seen."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write(partial)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(partial, path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write(path, lambda partial: partial.write_text(lines, encoding="utf-8"))


def train_tokenizer(texts: Iterable[str]):
    """A byte-level BPE tokenizer of `VOCAB_SIZE` pieces as a `PreTrainedTokenizerFast`; no BOS is added to texts.

    The chat template is left unset: coati supplies its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def make_data(out: str | Path, seed: int = 0) -> dict[str, Path]:
    """Write `sft.jsonl`, `preference_{train,eval}.jsonl`, `prompts_{train,eval}.jsonl` and `tokenizer/` into `out`.

    Returns:
        The path of each, by its name without the ending.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    book = yaml.safe_load(PHRASES.read_text(encoding="utf-8"))
    pairs = list(product(book["colors"], book["items"]))
    rng.shuffle(pairs)
    held_out = len(pairs) // 10
    train, evaluation = Shop(rng, book, pairs[held_out:]), Shop(rng, book, pairs[:held_out])

    rows = {
        "sft": list(train.sft(SIZES["sft"])),
        "sft_eval": evaluation.sft(SIZES["sft_eval"]),
        "preference_train": train.preferences(SIZES["preference_train"]),
        "preference_eval": evaluation.preferences(SIZES["preference_eval"]),
        "prompts_train": train.prompts(SIZES["prompts_train"]),
        "prompts_eval": evaluation.prompts(SIZES["prompts_eval"]),
    }
    paths = {name: out / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        write_jsonl(path, rows[name])

    dialogues = [[message["content"] for message in row["messages"]] for row in rows["sft"]]
    # With the words of coati's default chat template, so that they become pieces of their own.
    tokenizer = train_tokenizer(f"User: {user}\nAssistant: {assistant}" for user, assistant in dialogues)
    paths["tokenizer"] = out / "tokenizer"
    atomic_write(paths["tokenizer"], tokenizer.save_pretrained)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/data"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    args = parser.parse_args()
    for name, path in make_data(args.out, args.seed).items():
        print(f"{name:18} {path}")


if __name__ == "__main__":
    main()
