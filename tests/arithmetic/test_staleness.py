"""The table and the plot of what staleness costs, from runs' folders."""

import json
import sys

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

import staleness


def run(folder, right: list[float], wait: float, kl: float):
    """Iterations of three seconds and so many of waiting, of which the last was interrupted."""
    folder.mkdir(parents=True)
    rows = [{"step": 5 * i, "eval/reward": value} for i, value in enumerate(right)]
    spent = {"seconds/learn": 2.0, "seconds/evaluate": 1.0, "rollout_kl": kl}
    rows += [{"step": i, "seconds/wait": wait, **spent} for i in range(10)] + [
        {"step": 10, "seconds/wait": 900, **spent}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"before": right[0], "after": right[-1]}))


def test_rows_and_curves_are_over_the_seeds_that_are_there(tmp_path):
    for seed, more in enumerate((0.0, 0.2)):
        run(staleness.place(tmp_path / f"seed{seed}", 0, "none"), [0.4, 0.6 + more], 1.0, 0.0)
    run(staleness.place(tmp_path / "seed0", 2, "none"), [0.4, 0.5], 0.0, 0.25)
    _, _, synchronous, stale = staleness.summarize(tmp_path, [0, 1, 2]).splitlines()
    half = 12.71 * 10  # Student's t, one degree of freedom: 14.1 points / sqrt(2)
    gain = f"+30.0 ({30 - half:+.1f} to {30 + half:+.1f})"
    assert synchronous == f"| 0 | none | 40.0%, 40.0% | 60.0%, 80.0% | {gain} | 0.0e+00 | 4.00 | 25% |"
    assert stale == "| 2 | none | 40.0% | 50.0% | +10.0 | 2.5e-01 | 3.00 | 0% |"
    points = staleness.mean_curve(staleness.seeds_of(tmp_path, 0, "none"), "eval/reward")
    assert points == [(0, 0.4), (5, 0.7)]
    drawn = staleness.curves(tmp_path, [0, 1, 2])
    assert drawn.count(">seconds</text>") == 1 and drawn.count(">step</text>") == 2
    assert drawn.count("S = 0, seconds 20:") == 1  # five iterations of four seconds
