"""Training a mixture of experts: an even load where that is asked for, and a resumed run that knows it."""

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from coati.trainers.sft import SFTConfig, SFTTrainer
from tests.conftest import settings_for
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


def test_a_loss_for_a_model_without_experts_ends_before_the_first_step(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="this model has no experts: leave it out"):
        train(tiny_world, runtime, tmp_path, router_loss=0.1)
