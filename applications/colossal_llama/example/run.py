"""A small English model learns Chinese, on two CPU processes: every step of Colossal-LLaMA-2 and its effect.

python applications/colossal_llama/example/run.py --text FOLDER            # half an hour on two cores
python applications/colossal_llama/example/run.py --text FOLDER --seeds 2  # and the README's table and plot

FOLDER holds en_*.jsonl, en_*.txt and zh_*.jsonl. Every tenth document is held back. A run that was killed continues.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "applications")]

from colossal_llama.example.measure import measure, summarize  # noqa: E402
from colossal_llama.example.texts import write_texts  # noqa: E402
from examples.stages import run, train_script  # noqa: E402

ARMS = {
    "mean-initialized": ("extended", "mean", True),
    "random-initialized": ("extended", "random", True),
    "no extension": ("english", None, True),
    "no replay": ("extended", "mean", False),
}
"""By name: tokenizer, how new rows are initialized, and whether English is replayed."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of en_* and zh_* files")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "colossal_llama", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which ways of continuing")
    parser.add_argument("--chinese_before", type=float, default=0.1, help="share of the English model's first tokens")
    parser.add_argument("--tokens", type=float, default=1.0, help="scales how long everything is trained")
    arguments = parser.parse_args()
    output, started = arguments.output.resolve(), time.monotonic()
    data = prepare_data(arguments.text, output)
    for seed in range(arguments.seeds):
        english = pretrain(output / f"seed{seed}", data, seed, arguments)
        for arm in arguments.arms:
            continue_training(arm, english, output / f"seed{seed}", data, seed, arguments)
    measure(output, arguments)
    summarize(output, arguments, time.monotonic() - started)


def prepare_data(text: Path, output: Path) -> Path:
    """Texts by language, an English tokenizer, its Chinese extension, and packed rows of either."""
    data = output / "data"
    if not data.exists():
        write_texts(text, data)
    command("extend_tokenizer", data / "extended", tokenizer=data / "english", corpus=data / "zh.jsonl", size=4000)
    for tokenizer in ("english", "extended"):
        for part in ("", "_curve"):
            rows = dict(data=[data / f"en{part}.jsonl", data / f"zh{part}.jsonl"], max_length=256)
            packed = data / f"{tokenizer}-packed{part}"
            command("prepare_pretrain", packed, tokenizer=data / tokenizer, buckets=1 if part else 5, **rows)
    return data


def command(name: str, output: Path, **flags):
    """Runs one of the application's commands, unless its output is there."""
    if output.exists():
        return
    words = [sys.executable, str(HERE.parent / f"{name}.py"), "--output", str(output)]
    for flag, value in flags.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    run(words)


def pretrain(folder: Path, data: Path, seed: int, arguments) -> Path:
    """A model that knows English, and some Chinese as it reads it: byte by byte."""
    plan = yaml.safe_load((HERE / "english.yaml").read_text())
    plan["stages"][0]["tokens"] = round(plan["stages"][0]["tokens"] * arguments.tokens)
    chinese = arguments.chinese_before
    mix = {"en": 1 - chinese}
    if chinese:
        mix["zh"] = chinese
    plan |= dict(mix=mix, model={"model_config": str(HERE / "model.json")}, seed=seed)
    return train_stages(plan, folder / "english", data, "english", arguments)


def continue_training(arm: str, english: Path, folder: Path, data: Path, seed: int, arguments) -> Path:
    """The English model after the three stages, in one of the ways."""
    tokenizer, rule, replay = ARMS[arm]
    model = english
    if rule:
        model = folder / f"extended-{rule}"
        extended = dict(tokenizer=data / "extended", rule=rule, seed=seed)
        command("init_model", model, model=english, **extended)
    plan = yaml.safe_load((HERE / "chinese.yaml").read_text()) | dict(model={"path": str(model)}, seed=seed)
    for stage in plan["stages"]:
        mix = {"zh": stage["mix"]["zh"] * longer(data, tokenizer)}
        if replay:
            mix["en"] = stage["mix"]["en"]
        tokens = stage["tokens"] * arguments.tokens * sum(mix.values())  # as many Chinese characters for all
        stage |= dict(mix=mix, tokens=round(tokens))
    return train_stages(plan, folder / arm.replace(" ", "-"), data, tokenizer, arguments)


def longer(data: Path, tokenizer: str) -> float:
    """How many times as many tokens Chinese text has as with the extended tokenizer."""
    tokens = {}
    for name in (tokenizer, "extended"):
        manifest = json.loads((data / f"{name}-packed" / "manifest.json").read_text())
        tokens[name] = manifest["categories"]["zh"]["tokens"]
    return tokens[tokenizer] / tokens["extended"]


def train_stages(plan: dict, folder: Path, data: Path, tokenizer: str, arguments) -> Path:
    """Trains all stages of a plan; returns the last one's model."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = data / f"{tokenizer}-packed"
    plan["model"]["tokenizer"] = str(data / tokenizer)
    plan["data"] |= {"train_data": [str(packed)], "eval_data": [f"{packed}_curve"]}
    plan |= dict(output_dir=str(folder), checkpoints={"resume": "auto"})
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    last = folder / f"{len(plan['stages'])}-{plan['stages'][-1]['name']}" / "model"
    if not last.is_dir():
        train_script(HERE.parent / "train.py", ["--config", str(folder / "plan.yaml")], arguments.processes)
    if not last.is_dir():
        sys.exit(f"error: the stages in {folder} did not finish; their output is above")
    return last


if __name__ == "__main__":
    main()
