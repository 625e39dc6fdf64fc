"""SmolLM2 multiplies two-digit numbers, with a calculator and without: SFT on a few demonstrations, then GRPO.

    python examples/smollm2/calculator.py --write_docs
    python examples/smollm2/calculator.py --seed 1

What is finished isn't done again.
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.config.environment import EnvironmentConfig  # noqa: E402
from coati.environments.calculator import Calculator  # noqa: E402
from coati.errors import UserError  # noqa: E402
from coati.files import write_json  # noqa: E402
from coati.play import episodes_of  # noqa: E402
from coati.rollout import GenerationConfig, Prompt, describe_tools  # noqa: E402
from coati.samples import Sample  # noqa: E402
from coati.tracking import read_metrics, read_run  # noqa: E402
from examples.smollm2.check import Share, greedy_responses, read_rows  # noqa: E402
from examples.smollm2.model import make_model  # noqa: E402
from examples.smollm2.rewards import final_answer  # noqa: E402
from examples.smollm2.tasks import draw_operands, write_rows  # noqa: E402
from examples.stages import fill_figures, train  # noqa: E402

WAYS = {"tool": {"environment": "coati.environments.calculator:Calculator"}, "alone": {}}  # and what each adds
SIZES = {"sft": 96, "products": 1000, "products_eval": 100}
QUESTION = "What is {a} * {b}? End your response with one line: Answer: N"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/results.md too")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    try:
        model = make_model(output / "model")
    except UserError as error:
        sys.exit(f"error: {error}")
    folder = output / f"seed{arguments.seed}" / "calculator"
    data = make_products(folder / "data", arguments.seed)
    for way in WAYS:
        train_way(way, model, folder, data, arguments.seed, arguments.processes)
    table = figures(sorted(output.glob("seed*/calculator")))
    (output / "calculator.md").write_text(table + "\n")
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "results.md", table, "calculator")


def make_products(folder: Path, seed: int) -> dict[str, Path]:
    """Files by name; no two factors stand in two of them, in either order."""
    files = {}
    for name, factors in draw_operands(SIZES, seed).items():
        if name == "sft":
            for way, demonstration in (("tool", with_tool), ("alone", by_heart)):
                rows = [demonstration(a, b) for a, b in factors]
                files[f"{way}_sft"] = write_rows(folder / f"{way}_sft.jsonl", rows)
        else:
            files[name] = write_rows(folder / f"{name}.jsonl", [question(a, b) for a, b in factors])
    return files


def question(a: int, b: int) -> dict[str, str]:
    """A prompt, and a row for the environment, which asks its `question`."""
    text = QUESTION.format(a=a, b=b)
    return {"prompt": text, "question": text, "answer": str(a * b)}


def by_heart(a: int, b: int) -> dict:
    return {"prompt": QUESTION.format(a=a, b=b), "completion": f"Answer: {a * b}"}


def with_tool(a: int, b: int) -> dict:
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": f"{a} * {b}"}}}
    messages = [
        {"role": "user", "content": QUESTION.format(a=a, b=b)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculate", "content": str(a * b)},
        {"role": "assistant", "content": f"Answer: {a * b}"},
    ]
    return {"messages": messages, "tools": describe_tools(Calculator)}


def train_way(way: str, model: Path, folder: Path, data: dict[str, Path], seed: int, processes: int):
    """SFT and GRPO in one of the ways, and summary.json with what each can do."""
    summary = folder / way / "summary.json"
    if summary.exists():
        print(f"{folder / way} is finished already", flush=True)
        return
    common = {"seed": seed, "cache_dir": folder / "cache"}
    start = folder / f"{way}-sft"
    template = {"chat_template": HERE / "tools.jinja"}
    demonstrations = {"train_data": data[f"{way}_sft"], "eval_data": data[f"{way}_sft"]}
    train("sft", HERE / "calculator_sft.yaml", start, {"model": model} | common | template | demonstrations, processes)
    products = {"train_data": data["products"], "eval_data": data["products_eval"]}
    flags = {"model": start / "model"} | common | products | WAYS[way]
    train("grpo", HERE / "calculator.yaml", folder / way, flags, processes)
    found = {}
    for stage, path in {"SFT": start, "GRPO": folder / way}.items():
        share, sample = check_products(path / "model", data["products_eval"], way)
        found[stage] = {"right": [share.count, share.n], "sample": sample}
    write_json(summary, found)


def check_products(model: Path, path: Path, way: str) -> tuple[Share, str]:
    """Right products of held-out factors by greedy decoding, and the first response."""
    rows = read_rows(path)
    if way == "alone":
        responses = told = greedy_responses(model, rows)
    else:
        episodes = episodes_of(Calculator, str(model), EnvironmentConfig(max_turns=3, max_tokens=192))
        prompts = [Prompt(i, [0, i], [], "", row) for i, row in enumerate(rows)]
        samples = episodes.sample(prompts, GenerationConfig(temperature=0, max_new_tokens=48)).samples
        responses, told = [sample.response for sample in samples], [conversation(sample) for sample in samples]
    right = [final_answer(text) == row["answer"] for text, row in zip(responses, rows, strict=True)]
    return Share(sum(right), len(right)), told[0]


def conversation(sample: Sample) -> str:
    """What came after the question."""
    return " -> ".join(message["content"] for message in sample.messages[1:])


def figures(folders: list[Path]) -> str:
    """A line for each seed and way."""
    lines = ["| seed | way | minutes of GRPO | right after SFT | right after GRPO | the first held-out response |"]
    lines.append("|---" * 6 + "|")
    for folder in folders:
        for way in WAYS:
            path = folder / way / "summary.json"
            if path.exists():
                found, metrics, run = json.loads(path.read_text()), read_metrics(folder / way), read_run(folder / way)
                shares = [str(Share(*found[stage]["right"])) for stage in ("SFT", "GRPO")]
                minutes = (metrics[-1]["time"] - run["start"]) / 60
                sample = f"`{found['GRPO']['sample']}`".replace("\n", " ")
                seed = folder.parent.name.removeprefix("seed")
                lines.append(f"| {seed} | {way} | {minutes:.1f} | {' | '.join(shares)} | {sample} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
