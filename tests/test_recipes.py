"""The recipes of published papers: their tables say what their settings are, and each trains."""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from coati.commands import COMMANDS
from coati.config import as_flags, parse_config
from coati.config.schema import by_path
from coati.config.yaml12 import plain, read_words
from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.schedule import learning_rate_at
from tests.conftest import ROOT, reward_model, settings_for, trainer_classes, write_rows

METHODS = {
    "instructgpt-ppo": "ppo",
    "zephyr-dpo": "dpo",
    "tulu3-dpo": "dpo",
    "deepseekmath-grpo": "grpo",
    "dapo": "dapo",
    "dr-grpo": "dr-grpo",
    "gspo": "gspo",
    "rloo": "rloo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "reinforce-plus-plus": "reinforce++",
}
FOLDER = ROOT / "examples" / "recipes"
PROCESSES = 8
# What a recipe may set without a row in its table: none of it changes what is learned.
OF_THE_RUN = ("output_dir", "micro_batch_size", "evaluation", "checkpoints", "data.eval_data", "data.bad_rows")
OF_THE_RUN += ("generation.generation_batch_size", "algorithm.cache_reference", "algorithm.type", "parallel")
# What a model brings along: how its texts look.
OF_THE_MODEL = ("data.eos_token", "data.chat_template")
SHOWN = {"rloo": "Sum it up.Fine.<eos>", "orpo": "<|user|>\nSum it up.<eos>\n<|assistant|>\nFine.<eos>\n"}


@dataclass(frozen=True)
class Row:
    """A row of a recipe's table.

    Attributes:
        setting: a path, such as optimizer.warmup or rewards[0].path; or words for what coati has no setting for.
        why: why ours is another value than the paper's; "" if there is nothing to say.
    """

    setting: str
    paper: str
    here: str
    why: str

    @property
    def is_path(self) -> bool:
        return " " not in self.setting


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def table_of(name: str) -> list[Row]:
    """The rows of the table in a recipe's comments, without its head."""
    lines = [line[2:].split(" | ") for line in text_of(name).splitlines() if line.startswith("# ") and " | " in line]
    cells = [[*(cell.strip() for cell in line), ""][:4] for line in lines]
    assert cells[0] == ["setting", "paper", "here", "why"]
    return [Row(*row) for row in cells[1:]]


@cache
def config_of(name: str, *flags: str):
    """What `coati METHOD --config FILE` makes of a recipe and flags behind it."""
    command = COMMANDS[METHODS[name]]
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), *flags]
    return parse_config(ALGORITHMS[command.algorithm].config, arguments, defaults=command.defaults)


def value_at(config, path: str) -> Any:
    """The setting at a path; KeyError if there is none."""
    for part in path.split("."):
        name, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", part).groups()
        if not hasattr(config, name):
            raise KeyError(path)
        config = getattr(config, name)
        config = config if index is None else config[int(index)]
    return config


def same(ours: Any, stated: Any) -> bool:
    """Whether a setting has the value that a table states; a list of one may be stated by its only entry."""
    if isinstance(ours, list | tuple) and not isinstance(stated, list):
        stated = [stated]
    if isinstance(ours, float) and not isinstance(stated, list | str | bool) and stated is not None:
        return math.isclose(ours, stated, rel_tol=1e-9)
    return (list(ours) if isinstance(ours, tuple) else ours) == stated


def yaml_value(cell: str) -> Any:
    """A cell as a configuration has it."""
    return plain(read_words(cell, "the table"))


def paths_in(values: dict, prefix: str = "") -> set[str]:
    """The paths of the settings that a file gives."""
    found = set()
    for name, value in values.items():
        if isinstance(value, dict):
            found |= paths_in(value, f"{prefix}{name}.")
        elif name == "model":
            found.add("model.path")
        else:
            found.add(prefix + name)
    return found


def test_there_are_these_recipes():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_in_the_paper_index_and_has_its_command(name):
    index = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    [row] = re.findall(rf"^\|.*\(\.\./examples/recipes/{name}\.yaml\).*$", index, re.MULTILINE)
    [number] = re.findall(r"arXiv (\d{4}\.\d{5})", text_of(name).splitlines()[0])
    assert f"https://arxiv.org/abs/{number}" in row and f"`coati {METHODS[name]}`" in row


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_short_and_begins_with_its_paper(name):
    lines = text_of(name).splitlines()
    assert re.match(r"# .+ \(.+ 20\d\d, arXiv \d{4}\.\d{5}\): .+", lines[0])
    assert f"`coati {METHODS[name]}`" in lines[1] and "Source" in lines[1]
    assert len([line for line in lines if line and not line.startswith("#")]) < 25
    assert len(lines) < 50 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_fits_its_method_and_eight_processes(name):
    config = config_of(name)
    config.check(PROCESSES)
    assert config.algorithm.type == METHODS[name]
    assert config.output_dir == f"runs/recipes/{name}"


@pytest.mark.parametrize("name", METHODS)
def test_a_table_says_what_the_settings_are(name):
    """Also those that a recipe leaves at their defaults."""
    config, rows = config_of(name), table_of(name)
    wrong = {
        row.setting: (row.here, value_at(config, row.setting))
        for row in rows
        if row.is_path and not same(value_at(config, row.setting), yaml_value(row.here))
    }
    assert wrong == {}
    assert len(rows) >= 10 and len({row.setting for row in rows}) == len(rows)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_recipe_is_in_its_table(name):
    given = paths_in(yaml.safe_load(text_of(name)))
    stated = {row.setting.partition("[")[0] for row in table_of(name)}
    assert sorted(p for p in given - stated if not p.startswith(OF_THE_RUN + OF_THE_MODEL)) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_difference_to_the_paper_has_its_reason(name):
    """A paper's value is what stands before brackets; those hold its source, or what it was derived from."""
    for row in table_of(name):
        paper = row.paper.partition(" (")[0]
        if paper not in ("same", "not stated", "not verified"):
            assert row.why or yaml_value(paper) == yaml_value(row.here), row


STEPS_OF_WARMUP = [
    (name, *map(int, found.groups()))
    for name in METHODS
    for row in table_of(name)
    if row.setting == "optimizer.warmup" and (found := re.search(r"the same: (\d+) of (?:about )?(\d+)", row.why))
]


@pytest.mark.parametrize(("name", "steps", "total"), STEPS_OF_WARMUP)
def test_a_share_of_warm_up_is_as_many_steps_as_the_paper_has(name, steps, total):
    config = config_of(name)
    rates = [learning_rate_at(k, total, 1.0, "constant", config.optimizer.warmup, 0.0) for k in range(total)]
    assert rates.index(1.0) + 1 == steps
    assert config.steps in (0, total)
    [paper] = [row.paper for row in table_of(name) if row.setting == "optimizer.warmup"]
    assert paper.startswith(f"{steps} ")


def test_a_table_that_lies_is_found():
    """The checks above can fail: of a row with another value, and of a setting that there is none."""
    config = config_of("zephyr-dpo")
    assert same(config.algorithm.beta, yaml_value("0.1")) and not same(config.algorithm.beta, yaml_value("0.01"))
    assert same(config.optimizer.learning_rate, yaml_value("5e-7"))
    assert not same(config.optimizer.learning_rate, yaml_value("5e-8"))
    assert not same(config.data.train_data, yaml_value("HuggingFaceH4/ultrafeedback_binarized"))
    with pytest.raises(KeyError):
        value_at(config, "optimizer.momentum")


@pytest.mark.parametrize("name", SHOWN)
def test_a_template_that_comes_with_a_recipe_is_that_of_its_model(name, tiny_world, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.chdir(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    tokenizer.chat_template = Path(config_of(name).data.chat_template).read_text(encoding="utf-8")
    dialogue = [{"role": "user", "content": "Sum it up."}, {"role": "assistant", "content": "Fine."}]
    assert tokenizer.apply_chat_template(dialogue, tokenize=False) == SHOWN[name]
    prompt = tokenizer.apply_chat_template(dialogue[:1], tokenize=False, add_generation_prompt=True)
    assert SHOWN[name].startswith(prompt) and prompt.endswith(("up.", "<|assistant|>\n"))


# --- each trains

# Sizes only. What is learned, and how the learning rate goes, stays the recipe's.
SMALL = "--steps 2 --micro_batch_size 4 --max_length 96 --samples 2 --progress off --plugin ddp --eos_token <eos>"
SMALL += " --precision fp32 --eval_every 0 --save_every 0"
SMALL_OF_ROLLOUTS = "--max_prompt_length 64 --max_new_tokens 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world) -> dict[str, str]:
    """The tiny world, with prompts whose answers rules can check, named as each recipe's data name them."""
    root = tmp_path_factory.mktemp("recipes")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(24)]
    rows = [row | {"reward_model": {"ground_truth": row["answer"]}} for row in rows]
    prompts = write_rows(root / "prompts.jsonl", rows)
    return tiny_world | {"prompts": prompts, "prompts_eval": prompts, "root": str(root)}


def small_flags(name: str, place: dict[str, str]) -> list[str]:
    """What makes a recipe's run small, and its models and data those of the tests."""
    config, algorithm = config_of(name), COMMANDS[METHODS[name]].algorithm
    tiny = settings_for(algorithm, place)
    flags = ["--output_dir", f"{place['root']}/{name}", "--cache_dir", place["cache"], "--model", place["policy"]]
    flags += ["--train_data", *tiny["train_data"], "--eval_data", *tiny["eval_data"], *SMALL.split()]
    if algorithm == "preference":
        return [*flags, "--batch_size", "8"]
    flags += [*SMALL_OF_ROLLOUTS.split(), "--batch_size", str(max(4, config.algorithm.minibatches))]
    if algorithm == "ppo":
        flags += ["--critic_model", place["policy"], "--ptx_data", place["sft"]]
    else:
        sizes = dict(group_size=2, overlong_buffer=2, max_refills=1)
        flags += as_flags({name: min(size, getattr(config.algorithm, name)) for name, size in sizes.items()})
    if any(reward.type == "classifier" for reward in config.rewards):
        flags += as_flags({"rewards": [reward_model(place["reward"])]})
    return flags


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_trains_for_two_steps(name, place, runtime, monkeypatch):
    """In this process: with the recipe's algorithm, schedule, optimizer and rewards by rule."""
    monkeypatch.chdir(ROOT)
    flags = small_flags(name, place)
    config = config_of(name, *flags)
    of_sizes = {flag.removeprefix("--") for flag in flags if flag.startswith("--")}
    for path, value in by_path(config_of(name)).items():
        if path.startswith(("algorithm.", "optimizer.", "scoring.")) and path.rpartition(".")[2] not in of_sizes:
            assert value_at(config, path) == value
    trainer_classes(COMMANDS[METHODS[name]].algorithm)[1](config, runtime).train()
    assert (ROOT / config.output_dir / "model" / "config.json").is_file()


# --- each fits

MEMORY = 80  # GiB of one of the eight GPUs
SEVEN_B = dict(num_hidden_layers=28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28)
THREE_B = dict(num_hidden_layers=36, hidden_size=2048, intermediate_size=11008, num_attention_heads=16)
PYTHIA = dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=16384, num_attention_heads=32)
# A published config.json: its class, and what differs from that class's defaults.
SHAPES = {
    "mistral": ("MistralConfig", {}),
    "llama3": ("LlamaConfig", dict(vocab_size=128264, intermediate_size=14336, num_key_value_heads=8)),
    "deepseek": ("LlamaConfig", dict(vocab_size=102400, num_hidden_layers=30)),
    "qwen-7b": ("Qwen2Config", SEVEN_B | dict(vocab_size=152064, num_key_value_heads=4)),
    "qwen-3b": ("Qwen2Config", THREE_B | dict(vocab_size=151936, num_key_value_heads=2, tie_word_embeddings=True)),
    "pythia": ("GPTNeoXConfig", PYTHIA | dict(vocab_size=50432)),
}
SHAPE_OF = {
    "HuggingFaceH4/mistral-7b-sft-beta": "mistral",
    "alignment-handbook/zephyr-7b-sft-full": "mistral",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "weqweasdas/RM-Mistral-7B": "mistral",
    "OpenRLHF/Llama-3-8b-sft-mixture": "llama3",
    "allenai/Llama-3.1-Tulu-3-8B-SFT": "llama3",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3",
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": "llama3",
    "deepseek-ai/deepseek-math-7b-instruct": "deepseek",
    "Qwen/Qwen2.5-7B": "qwen-7b",
    "Qwen/Qwen2.5-Math-7B": "qwen-7b",
    "Qwen/Qwen2.5-3B-Instruct": "qwen-3b",
    "cleanrl/EleutherAI_pythia-6.9b-deduped__sft__tldr": "pythia",
    "cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr": "pythia",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_fits_its_gpus(name, tmp_path):
    """By coati's own planner, with models of the published shapes."""
    import transformers

    from coati.planner.dry_run import plan
    from coati.planner.report import GIB, USABLE, read_workload

    text, found = text_of(name), set()
    for model, shape in SHAPE_OF.items():
        if model in text:
            class_name, sizes = SHAPES[shape]
            config_class = getattr(transformers, class_name)
            config_class(max_position_embeddings=32768, dtype="bfloat16", **sizes).save_pretrained(tmp_path / shape)
            text = text.replace(model, str(tmp_path / shape))
            found.add(model)
    assert config_of(name).model.path in found
    (tmp_path / "recipe.yaml").write_text(text)
    estimate = plan(read_workload(METHODS[name], ["--config", str(tmp_path / "recipe.yaml")], PROCESSES, on_gpu=True))
    assert estimate.peak.total() <= USABLE * MEMORY * GIB
