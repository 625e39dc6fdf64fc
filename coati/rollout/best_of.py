"""Best-of-n: the policy answers n times and the reward chooses (Stiennon et al., 2009.01325, section 4)."""

import math
from dataclasses import dataclass

import torch

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rollout.generate import Rollout, generate
from coati.rollout.prompts import eos_ids, response_texts


@dataclass(frozen=True)
class BestOf:
    """The answer of highest score to a prompt, and the scores of all n (`scores[best]` is its own)."""

    prompt: str
    response: str
    scores: list[float]
    best: int


def best_of_n_kl(n: int) -> float:
    """KL of the best of n answers from the policy, nats an answer: log n - (n - 1) / n (2009.01325, appendix G.3).

    Exact when no two answers have the same score, an upper bound otherwise (Beirami et al., 2401.01879).

    >>> round(best_of_n_kl(16), 3)
    1.835
    """
    return math.log(n) - (n - 1) / n


def best_of_n(
    actor,
    reward,
    prompts: list[str],
    n: int,
    *,
    tokenizer,
    config: GenerationConfig | None = None,
    batch_size: int = 64,
    **columns: list,
) -> list[BestOf]:
    """Draws n answers to each prompt and keeps the best.

    Args:
        actor: an `Actor`.
        reward: anything with `score(prompts, responses, **columns)`; it gets the sampled token ids as a trainer's does.
        prompts: as the model reads them (a chat template is already applied).
        tokenizer: the actor's.
        config: how answers are drawn; at temperature 0 all n would be the same.
        batch_size: answers drawn at a time.
        **columns: the reward's other columns, one value a prompt.

    Raises:
        UserError: n < 1, greedy decoding, an empty prompt, or scores that are not one finite number an answer.
    """
    config = config or GenerationConfig()
    if n < 1:
        raise UserError(f"best of {n}: n must be at least 1")
    if n > 1 and (config.temperature == 0 or config.num_beams > 1):
        raise UserError("best-of-n needs answers that differ: temperature above 0 and num_beams 1")
    owners = [i for i in range(len(prompts)) for _ in range(n)]
    scores, responses = [], []
    for start in range(0, len(owners), batch_size):
        rows = owners[start : start + batch_size]
        texts = [prompts[i] for i in rows]
        rollout = _answer(actor, texts, tokenizer, config)
        ends = eos_ids(tokenizer, actor)
        answers = [text.strip() for text in response_texts(tokenizer, rollout.response_ids(), ends)]
        given = {name: [values[i] for i in rows] for name, values in columns.items()}
        given |= dict(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask)
        given |= dict(response_mask=rollout.response_mask)
        scores += _checked(reward.score(texts, answers, **given), reward, len(rows))
        responses += answers
    chosen = []
    for i, prompt in enumerate(prompts):
        of_this = scores[i * n : (i + 1) * n]
        best = max(range(n), key=of_this.__getitem__)
        chosen.append(BestOf(prompt, responses[i * n + best], of_this, best))
    return chosen


def _answer(actor, texts: list[str], tokenizer, config: GenerationConfig) -> Rollout:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not all(rows):
        raise UserError("best-of-n: a prompt is empty")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return generate(actor, rows, config, eos_ids=eos_ids(tokenizer, actor), pad_id=pad, tokenizer=tokenizer)


def _checked(raw, reward, rows: int) -> list[float]:
    scores = torch.as_tensor(raw, dtype=torch.float32).cpu()
    if scores.shape != (rows,) or not scores.isfinite().all():
        name = getattr(reward, "name", type(reward).__name__)
        raise UserError(f"reward {name!r} must return one finite number an answer, not {str(raw)[:80]}")
    return scores.tolist()
