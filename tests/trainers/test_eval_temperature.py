"""The temperature of evaluations is theirs alone."""

from coati.config import configure
from coati.tracking import read_metrics, read_samples
from tests.conftest import settings_for, trainer_classes


def run(algorithm: str, world, runtime, folder, **changes):
    """Responses of the evaluation before the first step, and what the steps logged but for seconds."""
    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(output_dir=str(folder), steps=2, samples=100)
    trainer_class(configure(config_class, **settings_for(algorithm, world, **changes)), runtime).train()
    responses = [row["response"] for row in read_samples(folder) if row["step"] == 0]
    losses = [row["policy_loss"] for row in read_metrics(folder) if "policy_loss" in row]
    return responses, losses


def test_an_evaluation_may_be_greedy_while_training_samples(tiny_world, runtime, tmp_path):
    sampling = dict(top_k=5, temperature=1.0)
    sampled, losses = run("grpo", tiny_world, runtime, tmp_path / "sampled", **sampling)
    greedy, same_losses = run("grpo", tiny_world, runtime, tmp_path / "greedy", **sampling, eval_temperature=0.0)
    wanted, _ = run("ppo", tiny_world, runtime, tmp_path / "wanted", temperature=0.0)
    assert greedy == wanted != sampled
    assert same_losses == losses and len(losses) == 2


def test_an_evaluation_may_sample_while_training_is_greedy(tiny_world, runtime, tmp_path):
    sampled, losses = run("ppo", tiny_world, runtime, tmp_path / "sampled", temperature=0.0, eval_temperature=1.0)
    greedy, same_losses = run("ppo", tiny_world, runtime, tmp_path / "greedy", temperature=0.0)
    assert sampled != greedy
    assert same_losses == losses
