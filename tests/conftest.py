"""What several folders of tests share: a tiny world of data, tokenizer and model, and one process group."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings

from examples.tokenizer import byte_level_tokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("COATI_TEST_DEVICE") != "cuda":  # tests/gpu sets it; all others are about CPUs, GPU or no GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is an error at once, not after a minute of attempts

# a machine that is busy is no failure
settings.register_profile("calm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
ROOT = Path(__file__).resolve().parents[1]
WORDS = ("red blue green lamp chair clock order refund late soon thank please happy help sorry never").split()  # noqa: SIM905


def sentence(seed: int, length: int) -> str:
    """Words that depend on the numbers only."""
    return " ".join(WORDS[(seed * 7 + i * i * 3 + i) % len(WORDS)] for i in range(length))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stepwise(seed: int, prompt: str) -> dict:
    """A row of labeled steps, one to four, of which those that end in `never` are wrong; one in five has no label."""
    is_wrong = [(seed + step) % 3 == 0 for step in range(1 + seed % 4)]
    steps = [sentence(seed + i, 1 + i) + (" never" if wrong else " thank") for i, wrong in enumerate(is_wrong)]
    labels = [None if i and (seed + i) % 5 == 0 else not wrong or 0.1 * i for i, wrong in enumerate(is_wrong)]
    return {"prompt": prompt, "steps": steps, "labels": labels}


def with_scores(seed: int, prompt: str) -> dict:
    """A response of one to seven words with its number of words and of `late` and `soon` as scores, of which some are
    missing."""
    response = sentence(seed + 1, 1 + seed % 7)
    scores = {"helpfulness": response.count("late") - response.count("soon"), "verbosity": (1 + seed % 7) / 2}
    if seed % 4 == 1:
        scores["helpfulness"] = None
    if seed % 5 == 2:
        del scores["verbosity"]
    return {"prompt": prompt, "response": response, "scores": scores}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> dict[str, str]:
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(root: Path) -> dict[str, str]:
    """Paths by name: tokenizer, model_config, policy, teacher, reward, sft, sft_eval, pairs, pairs_eval, steps,
    steps_eval, scores, scores_eval, prompts, prompts_eval, cache.

    Rows differ in length, so that padding and bucketing have something to do.
    """
    import torch
    from transformers import LlamaConfig

    from coati.models import Actor, RewardModel

    words = f"User: {' '.join(WORDS)}\nAssistant: {' '.join(WORDS)}"
    tokenizer = byte_level_tokenizer([words] * 4, 320, SPECIAL)
    tokenizer.save_pretrained(root / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config.save_pretrained(root / "model")
    torch.manual_seed(7)
    Actor(config=config).save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    config = LlamaConfig(**config.to_dict() | dict(hidden_size=48))
    torch.manual_seed(8)
    teacher = Actor(config=config)
    torch.nn.init.normal_(teacher.model.lm_head.weight, std=0.3)  # distributions that are far from flat
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    world = {"tokenizer": str(root / "tokenizer"), "model_config": str(root / "model" / "config.json")}
    world["policy"], world["cache"] = str(root / "policy"), str(root / "cache")
    world["teacher"] = str(root / "teacher")
    RewardModel(world["policy"]).save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    world["reward"] = str(root / "reward")
    for name, start, count in (("", 0, 40), ("_eval", 40, 11)):
        numbers = range(start, start + count)
        asks = {i: sentence(i, 2 + i % 6) for i in numbers}
        world["sft" + name] = write_rows(
            root / f"sft{name}.jsonl",
            [{"prompt": asks[i], "completion": sentence(i + 1, 1 + i % 5)} for i in numbers],
        )
        world["pairs" + name] = write_rows(
            root / f"pairs{name}.jsonl",
            [
                {"prompt": asks[i], "chosen": "thank you " + sentence(i, 2), "rejected": "never " + sentence(i + 2, 1)}
                for i in numbers
            ],
        )
        world["steps" + name] = write_rows(root / f"steps{name}.jsonl", [stepwise(i, asks[i]) for i in numbers])
        world["scores" + name] = write_rows(root / f"scores{name}.jsonl", [with_scores(i, asks[i]) for i in numbers])
        world["prompts" + name] = write_rows(root / f"prompts{name}.jsonl", [{"prompt": asks[i]} for i in numbers])
    (root / "rewards.py").write_text(
        "def length(prompts, responses, **columns):\n    return [len(r) / 10 - 1 for r in responses]\n\n\n"
        "def odd(prompts, responses, **columns):\n    return [float(len(r) % 2) for r in responses]\n\n\n"
        "def broken(prompts, responses, **columns):\n    return [float('nan')] * len(responses)\n"
    )
    world["rewards"] = str(root / "rewards.py")
    return world


def write_new_model(folder: Path, texts: list[str]) -> str:
    """A Llama of 1 M parameters that has seen nothing, with a tokenizer for these texts."""
    import torch
    from transformers import LlamaConfig

    from coati.models import Actor
    from examples.real_data.run import train_tokenizer

    tokenizer = train_tokenizer(texts)
    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes)
    Actor(config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def functions(*places: str, weights: list[float] | None = None) -> list[dict]:
    """Rewards that are Python functions, as settings."""
    weights = [1.0] * len(places) if weights is None else weights
    return [dict(type="function", path=place, weight=w) for place, w in zip(places, weights, strict=True)]


def reward_model(path, **settings) -> dict:
    """A reward model as a reward, as settings."""
    return dict(type="model", path=str(path), **settings)


def settings_for(algorithm: str, world: dict[str, str], /, **changes) -> dict:
    """Settings of a tiny run of an algorithm, or of `sdpo`, as keywords of its config class."""
    data = {"sft": "sft", "reward": "pairs", "preference": "pairs", "ppo": "prompts", "grpo": "prompts"}
    data["prm"] = "steps"
    data |= {"distill": "sft", "sdpo": "prompts"}
    data = "scores" if "objectives" in changes else data[algorithm]
    settings = dict(
        model_config=world["model_config"],
        tokenizer=world["tokenizer"],
        cache_dir=world["cache"],
        train_data=[world[data]],
        eval_data=[world[data + "_eval"]],
        steps=4,
        batch_size=8,
        micro_batch_size=2,
        learning_rate=1e-2,
        max_length=96,
        progress="off",
        samples=4,
    )
    if algorithm == "preference":
        settings |= dict(learning_rate=3e-3, model=world["policy"], model_config=None)
    elif algorithm not in ("reward", "prm"):
        settings |= dict(max_new_tokens=8)
    if algorithm == "ppo":
        # greedy responses don't depend on which process draws them, so curves can be compared
        settings |= dict(temperature=0.0, rewards=functions(world["rewards"] + ":length"), critic_learning_rate=1e-2)
        settings |= dict(ppo_epochs=2, minibatches=2, learning_rate=3e-3, model=world["policy"], model_config=None)
        settings |= dict(max_prompt_length=96)
    if algorithm == "grpo":  # sampled responses, whose noise depends on the prompt alone
        settings |= dict(rewards=functions(world["rewards"] + ":length"), group_size=4, minibatches=2, ppo_epochs=2)
        settings |= dict(learning_rate=3e-3, model=world["policy"], model_config=None, max_prompt_length=96)
    if algorithm == "distill":  # of half of the rows the student's own responses
        settings |= dict(teacher=world["teacher"], on_policy_share=0.5, divergence="jsd", max_prompt_length=96)
        settings |= dict(learning_rate=3e-3, model=world["policy"], model_config=None)
    if algorithm == "sdpo":  # about half of the responses earn enough
        settings |= dict(algorithm="sdpo", group_size=4, rewards=functions(world["rewards"] + ":odd"))
        settings |= dict(teacher_prompt="never {prompt} lamp {success} thank", max_length=128, max_prompt_length=96)
        settings |= dict(learning_rate=3e-3, model=world["policy"], model_config=None)
    return settings | changes


def as_yaml(settings: dict) -> str:
    """Settings by their flags' names as a file has them, for the first algorithm that has all of them."""
    from coati.config.parse import nested
    from coati.config.schema import leaves, paths_named
    from coati.trainers.algorithms import ALGORITHMS

    for algorithm in ALGORITHMS.values():
        known = leaves(algorithm.config)
        if all(paths_named(name, known) for name in settings):
            return yaml.safe_dump(nested(algorithm.config, settings))
    raise ValueError(f"no algorithm has all of {sorted(settings)}")


def trainer_classes(algorithm: str):
    """(config class, trainer class)."""
    if algorithm == "sft":
        from coati.trainers.sft import SFTConfig, SFTTrainer

        return SFTConfig, SFTTrainer
    if algorithm == "reward":
        from coati.trainers.reward import RewardConfig, reward_trainer

        return RewardConfig, reward_trainer
    if algorithm == "prm":
        from coati.trainers.prm import PRMConfig, PRMTrainer

        return PRMConfig, PRMTrainer
    if algorithm == "preference":
        from coati.trainers.preference import PreferenceConfig, preference_trainer

        return PreferenceConfig, preference_trainer
    if algorithm == "pretrain":
        from colossal_llama.pretraining.pretrain_trainer import PretrainConfig, PretrainTrainer

        return PretrainConfig, PretrainTrainer
    if algorithm == "grpo":
        from coati.trainers.grpo import GRPOConfig, GRPOTrainer

        return GRPOConfig, GRPOTrainer
    if algorithm in ("distill", "sdpo"):
        from coati.trainers.distill import DistillConfig, distill_trainer

        return DistillConfig, distill_trainer
    from coati.trainers.ppo import PPOConfig, PPOTrainer

    return PPOConfig, PPOTrainer


@pytest.fixture(scope="session")
def runtime():
    """A process group of this process alone."""
    from coati.parallel import launch
    from coati.parallel.runtime import shutdown

    yield launch(0)
    shutdown()


@pytest.fixture(scope="session")
def browser():
    """Playwright's Chromium, or the system's; tests that need it are skipped where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright isn't installed: pip install playwright")
    with playwright.sync_playwright() as started:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        if path is None and not os.path.exists(started.chromium.executable_path):
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()
