"""SmolLM2 learns Chinese: its vocabulary is extended, new rows are initialized in two ways, and pre-training continues.

    python examples/smollm2/chinese.py --text ../shared/data/text --write_docs

FOLDER of --text holds en_*.jsonl, en_*.txt and zh_*.jsonl; every tenth document is held back. What is finished isn't
done again.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "applications")]

from coati.errors import UserError  # noqa: E402
from coati.files import write_json  # noqa: E402
from coati.tracking import read_metrics, read_run  # noqa: E402
from colossal_llama.example.measure import document_losses, interval  # noqa: E402
from colossal_llama.example.run import command  # noqa: E402
from colossal_llama.example.texts import write_texts  # noqa: E402
from examples.smollm2.model import make_model  # noqa: E402
from examples.stages import fill_figures, train_script  # noqa: E402

ARMS = ("mean", "random")  # how new rows are initialized
SIZE = 4000  # tokens that are added
CHARACTERS, LONGEST = 10_000, 400  # of each language's held-out documents, and of each of them


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of en_* and zh_* files")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/results.md too")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    try:
        model = make_model(output / "model")
    except UserError as error:
        sys.exit(f"error: {error}")
    data = prepare_data(arguments.text, model, output / "chinese" / "data")
    for arm in ARMS:
        train_arm(arm, model, output / "chinese", arguments.processes)
    summary = measure(model, output / "chinese", data)
    table = figures(summary, {arm: minutes(output / "chinese" / arm) for arm in ARMS})
    (output / "chinese" / "figures.md").write_text(table + "\n")
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "results.md", table, "chinese")


def prepare_data(text: Path, model: Path, data: Path) -> Path:
    """Texts by language, the model's tokenizer with Chinese tokens, and packed rows."""
    if not data.exists():
        write_texts(text, data)
    english, chinese = data / "en.jsonl", data / "zh.jsonl"
    command("extend_tokenizer", data / "tokenizer", tokenizer=model, corpus=chinese, old_text=english, size=SIZE)
    rows = dict(data=[english, chinese], max_length=256, buckets=2)
    command("prepare_pretrain", data / "packed", tokenizer=data / "tokenizer", **rows)
    return data


def train_arm(arm: str, model: Path, folder: Path, processes: int):
    """Gives the model rows for the new tokens, and trains the stages of chinese.yaml."""
    start, data = folder / f"{arm}-start", folder / "data"
    command("init_model", start, model=model, tokenizer=data / "tokenizer", rule=arm)
    flags = {"model": start, "output_dir": folder / arm, "train_data": data / "packed", "resume": "auto"}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    script = ROOT / "applications" / "colossal_llama" / "train.py"
    if not trained(folder, arm).is_dir():
        train_script(script, ["--config", str(HERE / "chinese.yaml"), *words], processes)
    if not trained(folder, arm).is_dir():
        sys.exit(f"error: the stages in {folder / arm} did not finish; their output is above")


def trained(folder: Path, arm: str) -> Path:
    """The model after the last stage."""
    return folder / arm / "2-knowledge" / "model"


def minutes(run: Path) -> float:
    """Of all stages' training steps and the start of their processes."""
    stages = sorted(run.glob("?-*"))
    return sum(read_metrics(stage)[-1]["time"] - read_run(stage)["start"] for stage in stages) / 60


def measure(model: Path, folder: Path, data: Path) -> dict:
    """Nats of every held-out document under every model, its characters and tokens, by model and language."""
    from transformers import AutoTokenizer

    texts = {language: beginnings(data / f"{language}_eval.jsonl") for language in ("zh", "en")}
    models = {"SmolLM2": model}
    for arm in ARMS:
        models |= {f"{arm}, untrained": folder / f"{arm}-start", f"{arm}, trained": trained(folder, arm)}
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for name, checked in models.items():
        if name in summary:
            continue
        print(f"measuring {checked}", flush=True)
        tokenizer, summary[name] = AutoTokenizer.from_pretrained(checked), {}
        for language, documents in texts.items():
            summary[name][language] = {
                "nats": document_losses(checked, documents),
                "characters": [len(text) for text in documents],
                "tokens": sum(map(len, tokenizer(documents)["input_ids"])),
            }
        write_json(path, summary)
    return summary


def beginnings(path: Path) -> list[str]:
    """The first `LONGEST` characters of documents that are spread over a file: `CHARACTERS` or a little more."""
    texts = [json.loads(line)["text"][:LONGEST] for line in path.open(encoding="utf-8")]
    return texts[:: max(1, sum(map(len, texts)) // CHARACTERS)]


def figures(summary: dict, minutes: dict[str, float]) -> str:
    """The tables of docs/results.md."""
    trained = ", ".join(f"{arm} {minutes[arm]:.1f} min" for arm in minutes)
    lines = ["| model | tokens per Chinese character | bits per character, Chinese | English |", "|---|---|---|---|"]
    for name, found in summary.items():
        rate = found["zh"]["tokens"] / sum(found["zh"]["characters"])
        cells = [f"{difference(found[language])[0]:.3f}" for language in ("zh", "en")]
        lines.append(f"| {name} | {rate:.3f} | {' | '.join(cells)} |")
    lines += ["", "| difference of bits per character | Chinese | English |", "|---|---|---|"]
    pairs = [(f"{arm}, trained", "SmolLM2") for arm in minutes] + [
        (f"mean, {when}", f"random, {when}") for when in ("untrained", "trained")
    ]
    for name, other in pairs:
        cells = []
        for language in ("zh", "en"):
            value, low, high = difference(summary[name][language], summary[other][language])
            cells.append(f"{value:+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {name} minus {other} | {' | '.join(cells)} |")
    return "\n".join([f"Training: {trained}, start of the processes included.", "", *lines])


def difference(found: dict, other: dict | None = None) -> tuple[float, float, float]:
    """Bits per character, less those of another model, with the 95 % bootstrap interval over documents."""
    nats, characters = np.array(found["nats"]), np.array(found["characters"])
    if other is not None:
        nats = nats - np.array(other["nats"])
    return nats.sum() / characters.sum() / math.log(2), *interval(nats, characters)


if __name__ == "__main__":
    main()
