"""Writes the tables of layouts in docs/plugins.md from the results of two tests in tests/distributed.

python tools/layout_table.py                     # runs the tests first: about 40 minutes on 2 cores
python tools/layout_table.py --results FOLDER    # of a run that is over: pytest's basetemp
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.parallel.decoders import DECODERS
from examples.stages import ROOT, fill_figures, table_of
from tests.distributed.world import LAYOUTS, runs_under, without_ties

ALL_WEIGHTS = ("sft", "reward", "ppo")
KINDS = {"dpo": "DPO", "cached": "DPO, cached reference", "kto": "KTO", "grpo": "GRPO", "distill": "distillation"}
TEXT = (
    "The largest relative difference of any number that {} (of at least 0.1, as smaller ones are differences of larger "
    "ones){}. `tools/layout_table.py` wrote it."
)
IN_BF16 = "; in bf16, whose 8 bits round everything by up to 4e-3, of the losses of SFT and the reward model"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="pytest's basetemp; without it the tests are run")
    folder = parser.parse_args().results
    if folder:
        write_tables(folder)
        return
    with tempfile.TemporaryDirectory() as base:
        tests = [f"tests/distributed/test_{name}.py" for name in ("model_parallel", "preference_and_grpo")]
        command = [sys.executable, "-m", "pytest", "-q", *tests, "--basetemp", f"{base}/pytest"]
        done = subprocess.run(command, cwd=ROOT)
        write_tables(Path(base) / "pytest")
    sys.exit(done.returncode)


def write_tables(base: Path):
    """Those whose tests were run."""
    results = results_of(base / "layouts0")
    if results:
        tables = {"layouts": (ALL_WEIGHTS, "the three runs log", IN_BF16)}
        tables |= {"layouts of LoRA": (("lora ppo",), "a run of PPO logs", "")}
        tables |= {"layouts of QLoRA": (("qlora ppo",), "a run of PPO logs", "")}
        for mark, (runs, of_what, of_bf16) in tables.items():
            rows = {family: partial(of_family, family, runs) for family in DECODERS}
            fill_figures(ROOT / "docs" / "plugins.md", table(results, TEXT.format(of_what, of_bf16), rows), mark)
    results = results_of(base / "preference0")
    if results:
        rows = {title: partial(of_kind, kind) for kind, title in KINDS.items()}
        text = TEXT.format("a run logs", ", llama, fp32")
        fill_figures(ROOT / "docs" / "plugins.md", table(results, text, rows), "family")


def results_of(folder: Path) -> dict:
    """Of all runs, by name."""
    results = {}
    for path in sorted(folder.glob("*/results.json")):
        results |= json.loads(path.read_text())
    return results


def of_family(family: str, runs: Sequence[str], layout: str) -> list[str]:
    """The runs of an architecture that make a cell; none where the layout is unsupported."""
    if not runs_under(layout, family):
        return []
    # greedy responses differ in bf16
    return [f"{family}-{algorithm}" for algorithm in (runs[:2] if "bf16" in layout else runs)]


def of_kind(kind: str, layout: str) -> list[str]:
    return [kind]


def table(results: dict, text: str, rows: dict[str, Callable[[str], list[str]]]) -> str:
    """Layouts that were run for any row as columns.

    Args:
        rows: by title, the runs under a layout that make a cell.
    """
    cells = {title: [difference(results, layout, runs(layout)) for layout in LAYOUTS] for title, runs in rows.items()}
    shown = [i for i in range(len(LAYOUTS)) if any(row[i] not in ("", "unsupported") for row in cells.values())]
    heads = [list(LAYOUTS)[i] for i in shown]
    return f"{text}\n\n" + table_of(["", *heads], [[title, *(row[i] for i in shown)] for title, row in cells.items()])


def difference(results: dict, layout: str, runs: list[str]) -> str:
    """Empty for what was not run."""
    errors = []
    for run in runs:
        mine, theirs = results.get(f"{layout}-{run}"), results.get(f"one-{run}")
        if not mine or not theirs:
            return ""
        steps = [without_ties(x["steps"]) if run in KINDS else x["steps"] for x in (mine, theirs)]
        for a, b in zip(*steps, strict=True):
            names = [name for name in b if name == "loss" or "bf16" not in layout]
            errors += [abs(a[name] - b[name]) / max(abs(b[name]), 0.1) for name in names]
    return f"{max(errors):.0e}" if errors else "unsupported"


if __name__ == "__main__":
    main()
