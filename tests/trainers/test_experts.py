"""Training a mixture of experts: an even load where that is asked for, and a resumed run that knows it."""

import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.rollout import padded_routing
from coati.tracking import read_metrics
from coati.trainers.sft import SFTConfig, SFTTrainer
from tests.conftest import functions, reward_model, settings_for, trainer_classes
from tests.distributed.runs import assert_same_end, log_of
from tests.distributed.world import make_family


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    return make_family("qwen3_moe", tiny_world, tmp_path_factory.mktemp("experts"))


def train(world, runtime, output, **changes):
    settings = settings_for("sft", world, output_dir=str(output), model=world["policy"], model_config=None, **changes)
    SFTTrainer(configure(SFTConfig, **settings), runtime).train()
    return [row for row in read_metrics(output) if "expert_load_max" in row]


def test_the_loss_evens_the_load(world, runtime, tmp_path):
    changes = dict(steps=60, learning_rate=1e-2, eval_data=[], save_every=0)
    without, with_loss = (train(world, runtime, tmp_path / str(c), router_loss=c, **changes) for c in (0.0, 1.0))
    assert "router_loss" not in without[0] and with_loss[0]["router_loss"] == pytest.approx(1.0)
    assert with_loss[0]["expert_load_max"] == without[0]["expert_load_max"] > 1.2
    assert with_loss[-1]["expert_load_max"] < without[-1]["expert_load_max"] - 0.3
    assert with_loss[-1]["expert_load_entropy"] > max(0.95, without[-1]["expert_load_entropy"])
    assert with_loss[-1]["loss"] < with_loss[0]["loss"] - 1


def test_a_resumed_run_goes_on_with_the_shares_of_the_step_before(world, runtime, tmp_path):
    changes = dict(router_loss=0.5, save_every=2, keep_checkpoints=9, eval_data=[])
    rows = train(world, runtime, tmp_path / "whole", **changes)
    assert rows[2]["router_loss"] > 1.001
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    train(world, runtime, tmp_path / "resumed", **changes, resume=str(checkpoint))
    assert_same_end(tmp_path / "whole", tmp_path / "resumed")
    assert log_of(tmp_path / "whole", after=2) == log_of(tmp_path / "resumed")


def learn(algorithm, world, runtime, output, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    own = dict(rewards=[reward_model(world["scorer"])], model=world["policy"], model_config=None, save_every=0)
    own |= dict(steps=2, minibatches=1, ppo_epochs=1, temperature=1.0, max_new_tokens=12)
    own |= dict(group_size=2) if algorithm == "grpo" else {}
    settings = settings_for(algorithm, world, output_dir=str(output), **own | changes)
    trainer_class(configure(config_class, **settings), runtime).train()
    return [row for row in read_metrics(output) if "policy_loss" in row]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_replayed_experts_are_those_of_training_where_nothing_rounds(algorithm, world, runtime, tmp_path):
    plain, replayed = (
        learn(algorithm, world, runtime, tmp_path / str(replay), router_replay=replay) for replay in (False, True)
    )
    names = ("reward", "policy_loss", "policy_grad_norm", "entropy", "kl", "expert_load_max")
    for found, expected in zip(replayed, plain, strict=True):
        assert {n: found[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-4, abs=1e-5)


def test_the_trainer_takes_the_experts_of_the_samples(world, runtime, tmp_path, monkeypatch):
    """Planted ones are off by far; with prompts that are read once, too."""
    changes = dict(steps=1, max_rollout_kl=100.0, micro_batch_size=4, share_prompts=True)
    [right] = learn("grpo", world, runtime, tmp_path / "right", router_replay=True, **changes)

    def planted(*arguments):
        routing = padded_routing(*arguments)
        return torch.where(routing < 0, routing, (routing + 1) % 4)

    monkeypatch.setattr("coati.trainers.policy.padded_routing", planted)
    [wrong] = learn("grpo", world, runtime, tmp_path / "wrong", router_replay=True, **changes)
    assert right["rollout_kl"] < 1e-9 < 1e-6 < wrong["rollout_kl"]


def test_replay_for_a_model_without_experts_ends_before_the_first_step(tiny_world, runtime, tmp_path):
    rewards = functions(tiny_world["rewards"] + ":odd")
    with pytest.raises(UserError, match="router_replay is for mixtures of experts"):
        learn("grpo", tiny_world | {"scorer": ""}, runtime, tmp_path, router_replay=True, rewards=rewards)


@pytest.mark.parametrize(
    "changes", [dict(pipeline_parallel=2), dict(sequence_parallel=2), dict(rollout_engine="vllm")], ids=str
)
def test_replay_where_it_cannot_be_is_refused_with_the_settings(changes):
    with pytest.raises(UserError, match="router_replay is for single responses of coati's rollout engine"):
        configure(trainer_classes("grpo")[0], router_replay=True, **changes).check()


def test_a_loss_for_a_model_without_experts_ends_before_the_first_step(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="this model has no experts: leave it out"):
        train(tiny_world, runtime, tmp_path, router_loss=0.1)
