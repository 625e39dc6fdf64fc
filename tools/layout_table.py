"""Writes the tables of layouts in docs/plugins.md from the results of two tests in tests/distributed.

python tools/layout_table.py                     # runs the tests first: about 15 minutes on 2 cores
python tools/layout_table.py --results FOLDER    # of a run that is over: pytest's basetemp, or what it has of one test
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.parallel.decoders import DECODERS
from examples.stages import ROOT, fill_figures
from tests.distributed.world import LAYOUTS

FIRST = ("sft", "reward", "ppo")
KINDS = {"dpo": "DPO", "cached": "DPO, cached reference", "kto": "KTO", "grpo": "GRPO"}
RELATIVE = "The largest relative difference of any number that {} (of at least 0.1, as smaller ones are differences of "
LAYOUTS_TEXT = (
    RELATIVE.format("the three runs log")
    + "larger ones); in bf16, whose 8 bits round everything by up to 4e-3, of the losses of SFT and the reward model. "
    "`tools/layout_table.py` wrote it."
)
KINDS_TEXT = RELATIVE.format("a run logs") + "larger ones), llama, fp32. `tools/layout_table.py` wrote it."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of pytest's; without it the tests are run")
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
    families = {family: {name: of_family(name, family) for name in LAYOUTS} for family in DECODERS}
    kinds = {title: {name: [(name, kind)] for name in LAYOUTS} for kind, title in KINDS.items()}
    for folder, mark, text, columns in (
        (base / "layouts0", "layouts", LAYOUTS_TEXT, families),
        (base / "preference0", "family", KINDS_TEXT, kinds),
    ):
        results = {}
        for path in sorted(folder.glob("*/results.json")):
            results |= json.loads(path.read_text())
        if results:
            fill_figures(ROOT / "docs" / "plugins.md", table(results, text, columns), mark)


def of_family(layout: str, family: str) -> list[tuple[str, str]]:
    """The runs of an architecture that make a cell; none where the layout is refused."""
    if "split_sequence" in layout and not DECODERS[family].splits_sequence:
        return []
    # greedy answers differ in bf16
    return [(layout, f"{family}-{algorithm}") for algorithm in (FIRST[:2] if "bf16" in layout else FIRST)]


def table(results: dict, text: str, columns: dict[str, dict[str, list]]) -> str:
    lines = [text, "", f"| layout | processes | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for layout in LAYOUTS:
        cells = [difference(results, column[layout]) for column in columns.values()]
        if any(cell not in ("", "refused") for cell in cells):
            lines.append(f"| {layout} | {4 if ' x ' in layout else 2} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(results: dict, runs: list[tuple[str, str]]) -> str:
    """Empty for what was not run."""
    errors = []
    for layout, name in runs:
        mine, theirs = results.get(f"{layout}-{name}"), results.get(f"one-{name}")
        if not mine or not theirs:
            return ""
        for a, b in zip(mine["steps"], theirs["steps"], strict=True):
            names = [name for name in b if name == "loss" or "bf16" not in layout]
            errors += [abs(a[name] - b[name]) / max(abs(b[name]), 0.1) for name in names]
    return f"{max(errors):.0e}" if errors else "refused"


if __name__ == "__main__":
    main()
