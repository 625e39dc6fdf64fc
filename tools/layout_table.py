"""Writes the tables of layouts in docs/plugins.md from the results of two tests in tests/distributed.

python tools/layout_table.py                     # runs the tests first: about 15 minutes on 2 cores
python tools/layout_table.py --results FOLDER    # of a run that is over: pytest's basetemp
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.parallel.decoders import DECODERS
from examples.stages import ROOT, fill_figures
from tests.distributed.world import LAYOUTS, without_ties

FIRST = ("sft", "reward", "ppo")
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
    families = {family: partial(of_family, family) for family in DECODERS}
    kinds = {title: partial(of_kind, kind) for kind, title in KINDS.items()}
    for folder, mark, text, columns in (
        ("layouts0", "layouts", TEXT.format("the three runs log", IN_BF16), families),
        ("preference0", "family", TEXT.format("a run logs", ", llama, fp32"), kinds),
    ):
        results = {}
        for path in sorted((base / folder).glob("*/results.json")):
            results |= json.loads(path.read_text())
        if results:
            fill_figures(ROOT / "docs" / "plugins.md", table(results, text, columns), mark)


def of_family(family: str, layout: str) -> list[str]:
    """The runs of an architecture that make a cell; none where the layout is unsupported."""
    if "split_sequence" in layout and not DECODERS[family].splits_sequence:
        return []
    # greedy responses differ in bf16
    return [f"{family}-{algorithm}" for algorithm in (FIRST[:2] if "bf16" in layout else FIRST)]


def of_kind(kind: str, layout: str) -> list[str]:
    return [kind]


def table(results: dict, text: str, columns: dict[str, Callable[[str], list[str]]]) -> str:
    """Args: columns: by title, the runs of a layout that make a cell."""
    lines = [text, "", f"| layout | processes | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for layout in LAYOUTS:
        cells = [difference(results, layout, runs(layout)) for runs in columns.values()]
        if any(cell not in ("", "unsupported") for cell in cells):
            lines.append(f"| {layout} | {4 if ' x ' in layout else 2} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
