"""The arithmetic example's table and plot, from runs' folders."""

import json
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

import results


def run(folder, metric: str, values: list[float], **summary):
    folder.mkdir(parents=True)
    rows = [{"step": 20 * i, f"eval/{metric}": value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(tmp_path):
    for seed, after in enumerate((0.7, 0.8, 0.9)):
        run(tmp_path / f"seed{seed}" / "grpo", "reward", [0.4, after], before=0.4, after=after, seconds=60)
        run(tmp_path / f"seed{seed}" / "dpo", "accuracy", [0.5, 0.75], before=0.4, after=0.5, seconds=30)
    return tmp_path


def test_a_row_gives_each_seed_and_the_interval_of_the_gain(runs):
    scripts = {"grpo": "grpo", "ppo": "ppo", "dpo": "preference"}
    results.summarize(runs, scripts)
    head, _, grpo, dpo = (runs / "figures.md").read_text().splitlines()
    half = 4.303 * 10 / 3**0.5  # Student's t, two degrees of freedom
    expected = f"+40.0 ({40 - half:+.1f} to {40 + half:+.1f})"
    assert grpo == f"| grpo | 40.0%, 40.0%, 40.0% | 70.0%, 80.0%, 90.0% | {expected} |  | 1.0 |"
    assert dpo.endswith("| 75.0%, 75.0%, 75.0% | 0.5 |") and head.count("|") == dpo.count("|")


def test_the_plot_has_a_line_for_each_algorithm_that_ran(runs):
    svg = results.curves(
        {name: sorted(runs.glob(f"*/{name}")) for name in ("grpo", "dpo")}, {"grpo": "grpo", "dpo": "preference"}
    )
    assert svg.startswith("<svg") and "means over 3 seeds" in svg
    assert "right answers to held-out sums" in svg and "held-out pairs told apart" in svg


def test_the_page_is_filled_when_asked_for(runs, monkeypatch):
    filled = []
    monkeypatch.setattr(results, "fill_figures", lambda *arguments: filled.append(arguments))
    monkeypatch.setattr(results, "ROOT", runs)
    (runs / "docs").mkdir()
    results.summarize(runs, {"grpo": "grpo", "dpo": "preference"})
    assert filled == []
    results.summarize(runs, {"grpo": "grpo", "dpo": "preference"}, write_docs="newer")
    assert [arguments[2] for arguments in filled] == ["newer"] and (runs / "docs" / "newer.svg").is_file()


def test_runs_without_pairs_have_neither_a_share_nor_a_line(runs):
    run(runs / "seed0" / "kto", "loss", [0.5, 0.4], before=0.4, after=0.5, seconds=30)
    results.summarize(runs, {"dpo": "preference", "kto": "preference"})
    assert (runs / "figures.md").read_text().splitlines()[-1].endswith("|  | 0.5 |")


def test_runs_that_sample_are_compared_with_grpos_gain_and_by_their_critic(runs):
    for seed, values in enumerate(([0.4, 0.6701], [0.4, 0.58], [0.4, 0.9])):
        run(runs / f"seed{seed}" / "ppo", "reward", values, before=0.4, after=values[-1], seconds=30)
        with open(runs / f"seed{seed}" / "ppo" / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": k, "explained_variance": k / 100}) + "\n" for k in range(50))
    results.summarize(runs, {"grpo": "grpo", "ppo": "ppo"})
    grpo, ppo = (runs / "figures.md").read_text().splitlines()[-2:]
    # GRPO's nine tenths are 0.67, 0.76, 0.85
    assert grpo.endswith("| 18, 18, 18 |  |") and ppo.endswith("| 20, never, 18 | 0.45, 0.45, 0.45 |")
    results.summarize(runs, {"ppo": "ppo"})
    for seed in range(3):
        (runs / f"seed{seed}" / "grpo" / "summary.json").unlink()
    results.summarize(runs, {"ppo": "ppo"})
    assert (runs / "figures.md").read_text().splitlines()[-1].endswith("|  | 0.45, 0.45, 0.45 |")


def test_a_value_is_first_reached_where_the_line_crosses_it():
    points = [(0, 0.5), (10, 0.4), (20, 0.6), (30, 0.6), (40, 0.7)]
    assert results.first_crossing(points, 0.45) == pytest.approx(12.5)
    assert results.first_crossing(points, 0.65) == pytest.approx(35)
    assert results.first_crossing(points, 0.71) is None
    assert results.first_crossing([(0, 0.5), (10, 0.6)], 0.4) == 0, "it was above from the beginning"
