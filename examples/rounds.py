"""Rounds of sampling several responses per prompt and training on them: rejection sampling and online DPO."""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from coati.data import prepare_tokenizer
from coati.models import Actor
from coati.rewards import Scorer, load_function
from coati.rollout import GenerationConfig, PolicyGenerator, Prompt, ResponseSampler, ScoredGeneration
from coati.rollout.prompts import eos_ids
from examples.stages import train


@dataclass(frozen=True)
class PromptSet:
    """Prompts of a round, and how often each is sampled.

    Attributes:
        prompts: a JSONL file of rows with a prompt, and what the reward reads.
        reward: FILE.py:function.
        n: responses to a prompt.
        most: at most so many prompts, drawn from the file.
        max_new_tokens: of a response.
    """

    prompts: Path
    reward: str
    n: int = 8
    most: int = 512
    max_new_tokens: int = 32


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt, its responses, and the reward of each."""

    prompt: str
    responses: list[str]
    rewards: list[float]

    @property
    def best(self) -> str:
        return self.responses[self.rewards.index(max(self.rewards))]

    @property
    def worst(self) -> str:
        return self.responses[self.rewards.index(min(self.rewards))]

    @property
    def is_informative(self) -> bool:
        """The responses differ in what they earn, and neither end is empty."""
        return max(self.rewards) > min(self.rewards) and bool(self.best and self.worst)


def run_rounds(description: str, algorithm: str, row_of: Callable[[ScoredPrompt], dict]):
    """Each round samples responses, makes training rows of the informative prompts, and trains; its policy starts the
    next.

    Args:
        algorithm: of `examples.stages.SCRIPTS`.
    """
    arguments = parse_rounds(description)
    model = arguments.model
    prompt_set = PromptSet(**{f.name: getattr(arguments, f.name) for f in fields(PromptSet)})
    for number in range(arguments.rounds):
        scored = sample_responses(model, prompt_set, [arguments.seed, number])
        mean = sum(sum(a.rewards) for a in scored) / sum(len(a.rewards) for a in scored)
        rows = [row_of(a) for a in scored if a.is_informative]
        print(
            f"round {number}: mean reward {mean:.3f}, {len(rows)} of {len(scored)} prompts are informative",
            flush=True,
        )
        if not rows:
            break
        folder = arguments.output / f"round{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"model": model, "train_data": folder / "rows.jsonl", "cache_dir": folder / "cache"}
        flags["seed"] = arguments.seed + number
        train(algorithm, arguments.config, folder / "run", flags, arguments.processes)
        model = folder / "run" / "model"
    print(f"the policy is in {model}")


def parse_rounds(description: str) -> argparse.Namespace:
    """The flags of both examples; `config` is that of the training in each round."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="the policy that the first round starts from")
    parser.add_argument("--prompts", type=Path, required=True, help="rows with a prompt, and what the reward reads")
    parser.add_argument("--reward", required=True, help="FILE.py:function")
    parser.add_argument("--config", type=Path, required=True, help="settings of the training in a round")
    parser.add_argument("--output", type=Path, required=True, help="where everything goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, default=PromptSet.n, help="responses to a prompt")
    parser.add_argument("--most", type=int, default=PromptSet.most, help="prompts of a round")
    parser.add_argument("--max_new_tokens", type=int, default=PromptSet.max_new_tokens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="processes that train")
    return parser.parse_args()


def sample_responses(model: Path, prompt_set: PromptSet, seed: list[int]) -> list[ScoredPrompt]:
    """n sampled responses of this model to each prompt, scored."""
    from transformers import AutoTokenizer

    actor, n = Actor(str(model)), prompt_set.n
    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(model), None, None)
    rows = [json.loads(line) for line in prompt_set.prompts.read_text().splitlines()]
    rows = random.Random(str(seed)).sample(rows, min(prompt_set.most, len(rows)))
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    texts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = []
    for i, row in enumerate(rows):
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompts += [Prompt(i, [*seed, i * n + k], ids[i], texts[i], columns) for k in range(n)]
    ends = eos_ids(tokenizer, actor)
    generator = PolicyGenerator.of_actor(actor, tokenizer, batch_size=256)
    scorer = Scorer([(load_function(prompt_set.reward), 1.0)])
    generation = ScoredGeneration(ResponseSampler(generator, tokenizer, ends), scorer)
    samples = generation.sample(prompts, GenerationConfig(max_new_tokens=prompt_set.max_new_tokens)).samples
    responses = [sample.response for sample in samples]
    rewards = [sample.total_reward for sample in samples]
    groups = [slice(i * n, i * n + n) for i in range(len(rows))]
    return [ScoredPrompt(row["prompt"], responses[g], rewards[g]) for row, g in zip(rows, groups, strict=True)]
