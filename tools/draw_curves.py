"""Draws the pictures of docs/reading-the-curves.md from real runs of PPO: a healthy one and four that fall ill.

    python tools/draw_curves.py             # some minutes on one core

The policy is a Llama of 0.03M parameters that has seen a little SFT; the reward asks for four polite words, each once,
and nothing else. Each illness is a setting or a few away from health. Runs that are already in --output are not
repeated.
"""

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from coati.config import configure  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from coati.tracking.charts import Line  # noqa: E402
from examples.drawing import figure  # noqa: E402

POLITE = {"please", "thank", "happy", "help"}
HEALTHY = dict(steps=50, batch_size=32, micro_batch_size=32, max_new_tokens=16, temperature=1.0, seed=1)
HEALTHY |= dict(learning_rate=2e-3, critic_learning_rate=5e-3, kl_coefficient=0.02, ppo_epochs=2, minibatches=2)


def rewards(words: float) -> dict:
    """Politeness, and what a word is worth."""
    weights = {"polite": 1.0, "words": words}
    return {"rewards": [{"type": "function", "path": f"{__file__}:{n}", "weight": w} for n, w in weights.items()]}


HEALTHY |= rewards(words=0.0)
# What lies outside is drawn at the edge: an untrained critic's first figures would flatten all others
LIMITS = {"explained_variance": (-1.0, 1.0), "value_loss": (0.0, 0.1)}
# Of each run: its name in the legend, what makes it ill, and the curves that tell
RUNS = {
    "healthy": ("healthy", {}, "reward kl entropy explained_variance clip_fraction response_length"),
    "kl-blow-up": (
        "the policy's learning rate 10 times as high, hardly any clipping and KL penalty",
        dict(learning_rate=2e-2, kl_coefficient=1e-4, clip_low=0.9, clip_high=9.0, steps=24),
        "kl approximate_kl reward",
    ),
    "value-collapse": (
        "the critic's learning rate 100 times as high",
        dict(critic_learning_rate=0.5),
        "explained_variance value_loss reward",
    ),
    "length-bias": (
        "each word is worth 0.2 too",
        rewards(words=0.2),
        "reward reward/polite response_length",
    ),
    "dead-entropy": (
        "the policy's learning rate 15 times as high",
        dict(learning_rate=3e-2),
        "entropy reward_std reward",
    ),
}


def polite(prompts, responses, **columns):
    """1 for the four polite words, each once; repetition and other words are worth nothing and take up room."""
    return [len(POLITE & set(r.split())) / max(len(r.split()), len(POLITE)) for r in responses]


def words(prompts, responses, **columns):
    return [len(r.split()) for r in responses]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "curves", help="where the runs go")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="where the pictures go")
    arguments = parser.parse_args()
    train_all(arguments.output.resolve())
    for name, (label, _, metrics) in RUNS.items():
        folders = {label: arguments.output / name}
        if name != "healthy":
            folders = {"healthy": arguments.output / "healthy", **folders}
        charts = {title(metric): lines(folders, metric) for metric in metrics.split()}
        (arguments.pictures / f"curves-{name}.svg").write_text(figure(charts, list(folders)))


def title(metric: str) -> str:
    return metric + (", cut at {:g} and {:g}".format(*LIMITS[metric]) if metric in LIMITS else "")


def lines(folders: dict[str, Path], metric: str) -> list[Line]:
    """A run's curve each, in the order of its colors."""
    low, high = LIMITS.get(metric, (-math.inf, math.inf))
    curves = []
    for color, (label, folder) in enumerate(folders.items()):
        points = [(row["step"], min(max(row[metric], low), high)) for row in read_metrics(folder) if metric in row]
        curves.append(Line(label, color, points))
    return curves


def train_all(output: Path):
    """SFT, then the runs of PPO that aren't there yet, all in this process."""
    from coati.parallel import launch
    from coati.parallel.runtime import shutdown
    from tests.conftest import make_world, settings_for, trainer_classes

    runtime = launch(0)

    def train(algorithm: str, folder: Path, **changes):
        if (folder / "model").is_dir():
            return
        config_class, trainer_class = trainer_classes(algorithm)
        settings = settings_for(algorithm, world, output_dir=str(folder), eval_data=[], **changes)
        trainer_class(configure(config_class, **settings), runtime).train()

    (output / "world").mkdir(parents=True, exist_ok=True)
    world = make_world(output / "world")
    train("sft", output / "sft", steps=120, batch_size=16, micro_batch_size=16)
    for name, (_, changes, _) in RUNS.items():
        train("ppo", output / name, model=str(output / "sft" / "model"), **HEALTHY | changes)
    shutdown()


if __name__ == "__main__":
    main()
