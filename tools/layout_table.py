"""Writes the table of layouts in docs/plugins.md from the results of tests/distributed/test_model_parallel.py.

python tools/layout_table.py                     # runs the tests first: about 10 minutes on 2 cores
python tools/layout_table.py --results FOLDER    # of a run that is over: PYTEST'S BASETEMP/layouts0
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

ALGORITHMS = ("sft", "reward", "ppo")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder of results.json files; without it the tests are run")
    folder = parser.parse_args().results
    if folder:
        write_table(folder)
        return
    with tempfile.TemporaryDirectory() as base:
        tests = "tests/distributed/test_model_parallel.py"
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", tests, "--basetemp", f"{base}/pytest"], cwd=ROOT)
        write_table(Path(base) / "pytest" / "layouts0")
    sys.exit(done.returncode)


def write_table(folder: Path):
    results = {}
    for path in sorted(folder.glob("*/results.json")):
        results |= json.loads(path.read_text())
    lines = [
        "The largest relative difference of any number that the three runs log (of at least 0.1, as smaller ones are "
        "differences of larger ones); in bf16, whose 8 bits round everything by up to 4e-3, of the losses of SFT and "
        "the reward model. `tools/layout_table.py` wrote it.",
        "",
        f"| layout | processes | {' | '.join(DECODERS)} |",
        "|" + "---|" * (len(DECODERS) + 2),
    ]
    for layout in LAYOUTS:
        cells = [difference(results, layout, family) for family in DECODERS]
        if any(cells):
            lines.append(f"| {layout} | {4 if ' x ' in layout else 2} | {' | '.join(cells)} |")
    fill_figures(ROOT / "docs" / "plugins.md", "\n".join(lines), "layouts")


def difference(results: dict, layout: str, family: str) -> str:
    """Empty for what was not run."""
    if "split_sequence" in layout and not DECODERS[family].splits_sequence:
        return "refused"
    errors = []
    for algorithm in ALGORITHMS[:2] if "bf16" in layout else ALGORITHMS:  # greedy answers differ in bf16
        mine, theirs = results.get(f"{layout}-{family}-{algorithm}"), results.get(f"one-{family}-{algorithm}")
        if not mine or not theirs:
            return ""
        pairs = zip(mine["steps"], theirs["steps"], strict=True)
        for a, b in pairs:
            names = [name for name in b if name == "loss" or "bf16" not in layout]
            errors += [abs(a[name] - b[name]) / max(abs(b[name]), 0.1) for name in names]
    return f"{max(errors):.0e}"


if __name__ == "__main__":
    main()
