"""Runs SFT, a reward model and PPO of every architecture under every layout, and writes the table in docs/plugins.md.

    python tools/layout_table.py            # about 6 minutes on 2 idle cores

The models and runs are those of tests/distributed/world.py; 4 processes share the cores where a layout needs them.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.parallel.decoders import DECODERS
from examples.stages import ROOT, fill_figures
from tests.conftest import make_world
from tests.distributed.world import LAYOUTS, family_job, make_family, run_jobs

ALGORITHMS = ("sft", "reward", "ppo")


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = make_world(folder)
        worlds = {family: make_family(family, world, folder) for family in DECODERS}
        expected = run("one", worlds, folder, 1)
        rows = []
        for layout in LAYOUTS:
            found = run(layout, worlds, folder, 4 if " x " in layout else 2)
            rows.append([layout] + [worst(found, expected, layout, family) for family in worlds])
            print(*rows[-1], flush=True)
    write_table(list(worlds), rows)


def run(layout: str, worlds: dict, folder: Path, processes: int) -> dict:
    settings = LAYOUTS.get(layout, {})
    pairs = [(family, algorithm) for family in worlds for algorithm in ALGORITHMS if is_run(layout, family)]
    jobs = [family_job(f"{layout}-{f}-{a}", a, worlds[f], folder / "runs", **settings) for f, a in pairs]
    return run_jobs(jobs, folder / layout, processes)


def can(layout: str, family: str) -> bool:
    return DECODERS[family].splits_sequence or "split_sequence" not in layout


def is_run(layout: str, family: str) -> bool:
    """Four processes on few cores are slow: two architectures stand for all there."""
    return can(layout, family) and (" x " not in layout or family in ("llama", "gpt2"))


def worst(found: dict, expected: dict, layout: str, family: str) -> str:
    """The largest difference of any logged number (of at least 0.1: small ones are differences of larger ones)."""
    if not can(layout, family):
        return "refused"
    if not is_run(layout, family):
        return ""
    errors = []
    for algorithm in ALGORITHMS:
        mine, theirs = found[f"{layout}-{family}-{algorithm}"], expected[f"one-{family}-{algorithm}"]
        pairs = zip(mine["steps"], theirs["steps"], strict=True)
        errors += [abs(a[name] - b[name]) / max(abs(b[name]), 0.1) for a, b in pairs for name in b]
    return f"{max(errors):.0e}"


def write_table(families: list[str], rows: list[list]):
    lines = [
        "`tools/layout_table.py`: the largest relative difference of any logged number of the three runs.",
        "",
        f"| layout | processes | {' | '.join(families)} |",
        "|" + "---|" * (len(families) + 2),
    ]
    for layout, *errors in rows:
        processes = 4 if " x " in layout else 2
        lines.append(f"| {layout} | {processes} | {' | '.join(errors)} |")
    fill_figures(ROOT / "docs" / "plugins.md", "\n".join(lines), "layouts")


if __name__ == "__main__":
    main()
