"""Items whose responses are drawn from models. What was drawn is in the file of labels before the next batch begins, so
that a command that starts again draws nothing twice."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from coati.config.generation import GenerationConfig
from coati.label.items import AskedPrompt, Item, dialogue, make_item, text_fault
from coati.label.store import Store
from coati.tracking import TrackingConfig, progress_bar

BATCH = 64  # responses that are drawn together


def draw_items(
    store: Store, prompts: Sequence[AskedPrompt], models: Mapping[str, str], count: int, sampling: GenerationConfig
) -> tuple[list[Item], int]:
    """Items of the prompts that have none yet, in an order that follows from the file's seed; and how many prompts are
    left out because their responses are all the same or empty.

    Args:
        models: paths by name; they are opened one after the other.
        count: responses of each model to a prompt.

    Raises:
        UserError: a model can't be opened, or reads no prompt so long.
    """
    prompts, there = list(prompts), store.keys()
    random.Random(f"{store.seed()}/prompts").shuffle(prompts)
    prompts = [prompt for prompt in prompts if prompt.key not in there]
    for name, path in models.items():
        draw_missing(store, prompts, name, path, count, sampling)
    drawn = store.drawn()
    items, left_out = [], 0
    for prompt in prompts:
        texts = [(drawn[prompt.key, name, place], name) for name in models for place in range(count)]
        usable = [{"text": text, "model": name} for text, name in texts if text_fault(text) is None]
        if len({value["text"] for value in usable}) < 2:
            left_out += 1
        else:
            items.append(make_item(prompt.place, prompt.prompt, usable, prompt.key))
    return items, left_out


def draw_missing(
    store: Store, prompts: Sequence[AskedPrompt], name: str, path: str, count: int, sampling: GenerationConfig
) -> None:
    """Draws the responses of a model that the file doesn't have, and keeps each batch of them."""
    drawn, seed = store.drawn(), store.seed()
    missing = [(p, place) for p in prompts for place in range(count) if (p.key, name, place) not in drawn]
    if not missing:
        return
    from coati.responses import draw, open_policy

    opened = open_policy(path)
    with progress_bar(len(missing), f"responses of {name}", TrackingConfig()) as bar:
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            seeds = [[seed, _number(f"{name}/{prompt.key}"), place] for prompt, place in batch]
            texts = draw(opened, [prompt.dialogue for prompt, _ in batch], seeds, sampling)
            rows = [(p.key, name, place, text) for (p, place), text in zip(batch, texts, strict=True)]
            store.add_drawn(rows)
            for _ in rows:
                bar.advance()


def score_items(items: Sequence[Item], reward_model: str) -> dict[str, list[float]]:
    """Scores of each item's responses by a reward model, by the item's key.

    Args:
        reward_model: a model's folder, a run's or a checkpoint's.

    Raises:
        UserError: the model can't be opened, or can't read an item.
    """
    from coati.responses import open_scorer

    score, found = open_scorer(reward_model), {}
    with progress_bar(len(items), f"scores of {Path(reward_model).name}", TrackingConfig()) as bar:
        for item in items:
            messages = dialogue(f"the item {item.key!r}", item.prompt)
            found[item.key] = score(messages, [response.text for response in item.responses])
            bar.advance()
    return found


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
