"""Runs whose models are adapters of one base: it is in memory once, and nothing else can tell."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from coati.models import Actor, LoraSettings, RewardModel
from coati.models.shared_weights import SharedWeights
from coati.parallel import make_engine
from coati.tracking import read_metrics
from tests.conftest import reward_model
from tests.models.test_lora import with_noise
from tests.models.test_quantized import world_of
from tests.models.test_shared_weights import frozen, storages, trained
from tests.trainers.test_saving import make, said_by

CASES = [("ddp", "fp32"), ("zero2", "bf16")]
REST = [pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", "bf16"), ("zero2", "fp32"))]


def reward_adapter(base: str, folder: Path) -> str:
    """A reward model that is an adapter on a policy's base."""
    with_noise(RewardModel(base, lora=LoraSettings(4))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def four_roles(world, runtime, output: Path, base: str, adapter: str, /, **changes):
    """PPO with policy, critic, reference and reward on one base. The critic begins as the reward model."""
    settings = dict(model=base, lora_rank=4, rewards=[reward_model(adapter)], steps=2, save_every=1, max_new_tokens=4)
    settings |= dict(
        kl_coefficient=0.1, temperature=1.0, eval_data=[], max_rollout_kl=10.0, ppo_epochs=1, minibatches=1
    )
    return make("ppo", world, runtime, output, **settings | changes)


def models_of(runtime, monkeypatch) -> list:
    """Will hold the modules of all engines that are made."""
    import coati.trainers.factory as factory

    found = []

    def making(*arguments, **how):
        engine = make_engine(*arguments, **how)
        found.append(engine.module)
        return engine

    monkeypatch.setattr(factory, "make_engine", making)
    return found


def left_by(folder: Path) -> dict[str, str]:
    """Hashes of all tensors that a run has written, by their files."""
    found = sorted(path for path in folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def told_by(folder: Path) -> list[dict]:
    """The metrics of all steps but for times."""
    rows = [json.loads(json.dumps(row)) for row in read_metrics(folder)]
    timed = ("seconds", "time", "tokens_per_second", "eta", "memory")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


@pytest.mark.parametrize("plugin, precision", CASES + REST)
def test_a_run_is_the_same_to_the_last_bit_as_with_four_models(
    plugin, precision, tiny_world, runtime, tmp_path, monkeypatch
):
    """Metrics, checkpoints with their optimizer states, and merged models."""
    how = dict(plugin=plugin, precision=precision)
    places = tiny_world["policy"], reward_adapter(tiny_world["policy"], tmp_path / "reward")
    four_roles(tiny_world, runtime, tmp_path / "one base", *places, **how).train()
    monkeypatch.setattr(SharedWeights, "share", lambda self, model: 0)
    four_roles(tiny_world, runtime, tmp_path / "four models", *places, **how).train()
    found = told_by(tmp_path / "one base")
    assert found == told_by(tmp_path / "four models") and found[-1]["kl"] != 0
    expected = left_by(tmp_path / "four models")
    assert left_by(tmp_path / "one base") == expected and len(expected) > 6


@pytest.mark.parametrize("plugin", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_run_on_4_bits_is_the_same_to_the_last_bit(plugin, tiny_world, runtime, tmp_path, monkeypatch):
    base = world_of(tiny_world, tmp_path, "nested")
    places, how = (base, reward_adapter(base, tmp_path / "reward")), dict(plugin=plugin, tokenizer=base)
    models = models_of(runtime, monkeypatch)
    four_roles(tiny_world, runtime, tmp_path / "one base", *places, **how).train()
    assert len(models) == 3
    together, alone = sum(storages(*models).values()), [sum(storages(model).values()) for model in models]
    monkeypatch.setattr(SharedWeights, "share", lambda self, model: 0)
    four_roles(tiny_world, runtime, tmp_path / "four models", *places, **how).train()
    assert sum(storages(*models[3:]).values()) == sum(alone) > together
    assert told_by(tmp_path / "one base") == told_by(tmp_path / "four models")
    assert left_by(tmp_path / "one base") == left_by(tmp_path / "four models")


@pytest.mark.parametrize("plugin, precision", CASES + REST)
def test_a_run_holds_one_base_and_all_adapters_and_heads(plugin, precision, tiny_world, runtime, tmp_path, monkeypatch):
    models, lines = models_of(runtime, monkeypatch), said_by(runtime, monkeypatch)
    places = tiny_world["policy"], reward_adapter(tiny_world["policy"], tmp_path / "reward")
    trainer = four_roles(tiny_world, runtime, tmp_path / "run", *places, plugin=plugin, precision=precision)
    actor, critic, reward = models
    assert trainer.reference.engine is trainer.actor
    base, in_base = sum(p.nbytes for p in frozen(actor)), storages(*frozen(actor)).keys()
    adapter = [p for p in reward.parameters() if not storages(p).keys() <= in_base]
    assert sum(storages(*models).values()) == base + sum(
        p.nbytes for p in [*trained(actor), *trained(critic), *adapter]
    )
    of_critic = sum(p.numel() for p in trained(critic)) - 1  # the bias of its head, which rewards lack
    assert sum(p.numel() for p in adapter) == of_critic < sum(p.numel() for p in frozen(critic)) // 4
    assert [line.split(":")[0] for line in lines if "frozen weights are shared" in line] == ["Critic", "RewardModel"]


def test_a_resumed_run_shares_its_base_and_goes_on_as_the_uninterrupted_one(tiny_world, runtime, tmp_path, monkeypatch):
    places = tiny_world["policy"], reward_adapter(tiny_world["policy"], tmp_path / "reward")
    four_roles(tiny_world, runtime, tmp_path / "whole", *places).train()
    models, start = models_of(runtime, monkeypatch), tmp_path / "whole" / "checkpoints" / "step-00000001"
    four_roles(tiny_world, runtime, tmp_path / "resumed", *places, resume=str(start)).train()
    assert storages(*frozen(models[0])).keys() >= storages(*frozen(models[1])).keys()
    assert told_by(tmp_path / "resumed")[-1] == told_by(tmp_path / "whole")[-1]
    expected, found = left_by(tmp_path / "whole"), left_by(tmp_path / "resumed")
    assert found == {name: expected[name] for name in found} and "model/model.safetensors" in found


def test_weights_that_are_replaced_during_a_run_are_no_other_model_s(tiny_world, runtime, tmp_path, monkeypatch):
    """A reference that becomes the policy, and a teacher that is an average: what else began as the same model stays
    what it was."""
    models = models_of(runtime, monkeypatch)
    AutoTokenizer.from_pretrained(tiny_world["policy"]).save_pretrained(tmp_path / "reward")
    RewardModel(tiny_world["policy"]).save_pretrained(tmp_path / "reward")
    how = dict(rewards=[reward_model(tmp_path / "reward")], steps=1, eval_data=[], kl_coefficient=0.1)
    make("grpo", tiny_world, runtime, tmp_path / "grpo", **how, refresh_reference=1).train()
    actor, reference, reward = models
    assert all(torch.equal(*pair) for pair in zip(actor.parameters(), reference.parameters(), strict=True))
    assert_stored(reward, tmp_path / "reward")

    how = dict(rewards=how["rewards"], steps=2, eval_data=[], teacher="self", teacher_ema=0.5)
    how |= dict(teacher_prompt="never {prompt}", max_length=128, on_policy_share=1.0)
    make("distill", tiny_world, runtime, tmp_path / "all weights", **how).train()
    teacher, student, reward = models[3:]
    start = Actor(tiny_world["policy"])
    assert not any(torch.equal(*pair) for pair in zip(teacher.parameters(), start.parameters(), strict=True))
    assert_stored(reward, tmp_path / "reward")

    make("distill", tiny_world, runtime, tmp_path / "adapters", **how, lora_rank=4).train()
    teacher, student, reward = models[6:]
    assert_stored(reward, tmp_path / "reward")
    of_teacher, of_student = (dict(model.named_parameters()) for model in (teacher, student))
    for name, parameter in of_student.items():
        assert (of_teacher[name] is parameter) == (not parameter.requires_grad), name


def assert_stored(model, folder: Path):
    """A reward model is what its folder has."""
    stored = RewardModel(folder)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), stored.parameters(), strict=True))


def test_with_all_weights_trained_nothing_that_trains_is_shared(tiny_world, runtime, tmp_path, monkeypatch):
    """The reference and a reward model's base are frozen: these two share."""
    models = models_of(runtime, monkeypatch)
    places = tiny_world["policy"], reward_adapter(tiny_world["policy"], tmp_path / "reward")
    four_roles(tiny_world, runtime, tmp_path / "run", *places, lora_rank=0, critic_model=tiny_world["policy"])
    actor, critic, reference, reward = models
    for model in (actor, critic):
        others = [other for other in models if other is not model]
        assert trained(model) == [*model.parameters()] and storages(model).keys().isdisjoint(storages(*others))
    assert storages(reference).keys() & storages(reward).keys()


def test_models_without_adapters_that_only_compute_share_with_a_base(tiny_world, runtime, tmp_path, monkeypatch):
    """The reward model that a critic with LoRA begins as, and a teacher that is the student's start."""
    models = models_of(runtime, monkeypatch)
    how = dict(lora_rank=4, eval_data=[])
    make("ppo", tiny_world, runtime, tmp_path / "ppo", **how, rewards=[reward_model(tiny_world["reward"])])
    _, critic, reward = models
    assert {*reward.transformer.parameters()} <= {*critic.parameters()}
    make("distill", tiny_world, runtime, tmp_path / "distill", **how, teacher="self")
    teacher, student = models[3:]
    assert {*teacher.parameters()} <= {*student.parameters()}
