"""What a reward doesn't measure: independent checks of models that were trained on one."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from coati.data import DataConfig, PreferenceSample, parse_record, prepare_tokenizer, tokenize
from coati.intervals import wilson_interval
from coati.models import Actor
from coati.rollout import GenerationConfig
from coati.rollout.generate import complete
from coati.rollout.generator import Request
from coati.rollout.prompts import eos_ids, response_texts
from examples.smollm2.rewards import final_answer, is_response, meets


@dataclass(frozen=True)
class Share:
    """How many of n are so, with the 95 % interval (Wilson)."""

    count: float
    n: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.count / self.n, self.n)
        return f"{self.count / self.n:.1%} ({low:.1%} to {high:.1%})"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def load(model: Path):
    """Model and tokenizer of a folder."""
    from transformers import AutoTokenizer

    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(model))
    return Actor(str(model)).eval(), tokenizer


def render(tokenizer, rows: list[dict], begun: str = "") -> list[str]:
    """Prompts in the chat template, each with the beginning of a response."""
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return [text + begun for text in tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)]


def greedy_responses(model: Path, rows: list[dict], begun: str = "", max_new_tokens: int = 24) -> list[str]:
    """Each prompt's response by greedy decoding, `begun` included."""
    actor, tokenizer = load(model)
    ids = tokenizer(render(tokenizer, rows, begun), add_special_tokens=False)["input_ids"]
    sampling, ends = GenerationConfig(temperature=0, max_new_tokens=max_new_tokens), eos_ids(tokenizer, actor)
    completions = complete(actor, [Request(row, [0]) for row in ids], sampling, eos_ids=ends)
    return [begun + text for text in response_texts(tokenizer, [c.ids for c in completions], ends)]


def check_sums(model: Path, data: Path) -> tuple[dict[str, Share], list[str]]:
    """Right sums of held-out operands, by what is asked: in the wording that was trained on, in two that were not, and
    where the response is made to begin with `Answer:`, so that no text before it can help.

    A trick of the reward's rule would show as a gain in the first only. Also returns the first response to each.
    """
    asked = {
        "trained wording": ("prompts_eval", ""),
        "trained wording, begun with Answer:": ("prompts_eval", "Answer:"),
        "other wording": ("prompts_reworded", ""),
        "other wording, without +": ("prompts_in_words", ""),
    }
    found, told = {}, []
    for name, (file, begun) in asked.items():
        rows = read_rows(data / f"{file}.jsonl")
        responses = greedy_responses(model, rows, begun)
        told.append(f"{rows[0]['prompt']} -> {responses[0]}")
        right = [final_answer(text) == row["answer"] for text, row in zip(responses, rows, strict=True)]
        found[name] = Share(sum(right), len(right))
    return found, told


def check_reversals(model: Path, data: Path) -> tuple[dict[str, Share], list[str]]:
    """Lists that are reversed to the letter, of the lengths that were trained and of longer ones; the task's own scorer
    also pays for parts. Also returns the first response to each.
    """
    found, told = {}, []
    for name, file in (("3 to 5 words", "reversals_eval"), ("6 or 7 words", "reversals_longer")):
        rows = [row | {"prompt": row["question"]} for row in read_rows(data / f"{file}.jsonl")]
        responses = greedy_responses(model, rows, max_new_tokens=48)
        words = [row["metadata"]["words"] for row in rows]
        right = [text == ", ".join(reversed(of_row)) for text, of_row in zip(responses, words, strict=True)]
        found[f"lists of {name} reversed"] = Share(sum(right), len(right))
        told.append(f"{', '.join(words[0])} -> {responses[0]}")
    return found, told


def check_constraints(model: Path, reference: Path, path: Path) -> tuple[dict[str, Share], float, list[str]]:
    """Constraints met, of all prompts and of each kind, the responses' log-prob per token under the model before
    training, and the responses.

    The second is the check of fluency: gibberish that meets a constraint is improbable under `reference`.
    """
    rows = read_rows(path)
    responses = greedy_responses(model, rows, max_new_tokens=48)
    met: dict[str, list[bool]] = {}
    for row, text in zip(rows, responses, strict=True):
        kind = row["constraint"]["name"].replace("_", " ")
        met.setdefault(kind, []).append(is_response(row["prompt"], text) and meets(text, row["constraint"]))
    found = {"constraints met": Share(sum(map(sum, met.values())), len(rows))}
    found |= {f"constraints met: {kind}": Share(sum(of_kind), len(of_kind)) for kind, of_kind in met.items()}
    sums = [log_prob(reference, row["prompt"], text) for row, text in zip(rows, responses, strict=True)]
    return found, sum(a for a, _ in sums) / sum(n for _, n in sums), responses


def log_prob(model: Path, prompt: str, response: str) -> tuple[float, int]:
    """The sum of the log-probs of a response's tokens, in nats, and their number; its EOS token counts."""
    tokenizer = load(model)[1]
    [text] = render(tokenizer, [{"prompt": prompt}])
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = tokenizer(response + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    mask = [False] * len(before) + [True] * len(after)
    return masked_log_prob(model, before + after, mask), len(after)


@torch.no_grad()
def masked_log_prob(model: Path, ids: list[int], mask: list[bool]) -> float:
    """The sum of the log-probs of the masked tokens, in nats."""
    tokens = torch.tensor([ids])
    log_probs = load(model)[0].transformer(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
    return log_probs[0, torch.tensor(mask[1:])].sum().item()


@cache
def likelihood_accuracy(model: Path, pairs: Path, max_length: int) -> Share:
    """Pairs whose chosen response is the more probable one under the model by itself, as sums of log-probs. Sums favor
    short responses. Longer rows lose the beginning of the prompt, and what can't be read is left out, as in the stages.
    """
    samples = read_pairs(pairs, model, max_length)
    wins = 0
    for sample in samples:
        chosen, rejected = (masked_log_prob(model, s.input_ids, s.loss_mask) for s in (sample.chosen, sample.rejected))
        wins += chosen > rejected
    return Share(wins, len(samples))


def bag_of_words_accuracy(train: Path, test: Path, model: Path, max_length: int) -> Share:
    """Pairs that a logistic regression on the counts of words tells apart: what is told by words alone. Its strength of
    regularization is chosen by cross-validation on the training pairs; a pair is the difference of its two responses.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegressionCV

    train_pairs, test_pairs = (response_pairs(path, model, max_length) for path in (train, test))
    counter = CountVectorizer(min_df=3).fit([text for pair in train_pairs for text in pair])

    def differences(pairs):
        chosen, rejected = (counter.transform(texts) for texts in zip(*pairs, strict=True))
        return chosen - rejected

    # every second pair is shown the other way round, so that both classes are there
    signs = [1 if i % 2 else -1 for i in range(len(train_pairs))]
    shown = differences(train_pairs).multiply([[sign] for sign in signs]).tocsr()
    classifier = LogisticRegressionCV(
        Cs=[0.001, 0.003, 0.01, 0.03, 0.1],
        cv=5,
        scoring="accuracy",
        l1_ratios=(0,),
        use_legacy_attributes=False,
        fit_intercept=False,
        max_iter=1000,
    )
    scores = classifier.fit(shown, signs).decision_function(differences(test_pairs))
    return Share(int((scores > 0).sum()), len(test_pairs))


def response_pairs(path: Path, model: Path, max_length: int) -> list[tuple[str, str]]:
    """The texts of chosen and rejected responses, of the pairs that the stages read."""
    tokenizer = load(model)[1]
    return [
        (response_text(tokenizer, sample.chosen), response_text(tokenizer, sample.rejected))
        for sample in read_pairs(path, model, max_length)
    ]


def response_text(tokenizer, sample) -> str:
    masked = [token for token, learned in zip(sample.input_ids, sample.loss_mask, strict=True) if learned]
    return tokenizer.decode(masked, skip_special_tokens=True)


def read_pairs(path: Path, model: Path, max_length: int) -> list[PreferenceSample]:
    """The pairs of a file that the stages read, in a model's tokens."""
    config, tokenizer = DataConfig(max_length=max_length, too_long="truncate_prompt"), load(model)[1]
    return [sample for row in read_rows(path) for sample in tokenized(row, tokenizer, config)]


def tokenized(row: dict, tokenizer, config: DataConfig) -> list[PreferenceSample]:
    """The pair of a row; none where a response is empty or the row too long."""
    try:
        return [tokenize(record, tokenizer, config) for record in parse_record(row, "preference")]
    except ValueError:
        return []
