"""PPO with policy and critic on one trunk."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from coati.config import configure
from coati.errors import UserError
from coati.models import ActorCritic, AutoModelForCausalLMWithValueHead
from coati.rewards import AdapterReward, Reward
from coati.tracking import read_metrics
from coati.trainers.ppo import PPOConfig, PPOTrainer
from tests.conftest import settings_for


def make(world, runtime, output, *, policy=None, given=(), **changes) -> PPOTrainer:
    settings = settings_for("ppo", world, output_dir=str(output), shared_trunk=True, **changes)
    return PPOTrainer(configure(PPOConfig, **settings), runtime, policy=policy, rewards=given)


def test_it_learns_and_leaves_a_value_head_folder(tiny_world, runtime, tmp_path):
    make(tiny_world, runtime, tmp_path, steps=8).train()
    rewards = [row["eval/reward"] for row in read_metrics(tmp_path) if "eval/reward" in row]
    assert rewards[-1] > rewards[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "model"))
    assert torch.equal(model.v_head.summary.weight, ActorCritic(tmp_path / "model").v_head.summary.weight)


def test_in_the_warm_up_only_the_head_moves(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, steps=1, critic_warmup=1)
    before = {name: p.detach().clone() for name, p in trainer.actor.module.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.actor.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"v_head.summary.weight", "v_head.summary.bias"}


def test_the_head_learns_at_the_critic_s_rate(tiny_world, runtime, tmp_path):
    """Adam's first step moves every weight by its learning rate, whatever the gradient."""
    rates = dict(learning_rate=1e-3, critic_learning_rate=5e-3, warmup=0.0, schedule="constant")
    trainer = make(tiny_world, runtime, tmp_path, steps=1, ppo_epochs=1, minibatches=1, **rates)
    before = {name: p.detach().clone() for name, p in trainer.actor.module.named_parameters()}
    trainer.step(0)
    moves = {name: (p - before[name]).abs().max().item() for name, p in trainer.actor.module.named_parameters()}
    assert moves.pop("v_head.summary.weight") == pytest.approx(5e-3, rel=1e-2)
    assert moves.pop("v_head.summary.bias") == pytest.approx(5e-3, rel=1e-2)
    assert max(moves.values()) == pytest.approx(1e-3, rel=1e-2)


def test_one_gradient_is_the_sum_of_both_losses(tiny_world, runtime, tmp_path):
    """The trunk's gradient with value coefficient c is the policy's alone plus c times the value loss's alone."""

    def gradient(name, **changes):
        trainer = make(tiny_world, runtime, tmp_path / name, ppo_epochs=1, minibatches=1, **changes)
        gradients = {}
        step, trainer.actor.step = trainer.actor.step, lambda rate, **options: keep() or step(rate, **options)

        def keep():
            gradients.update({n: p.grad.clone() for n, p in trainer.actor.module.named_parameters()})

        trainer.step(0)
        return gradients

    policy, both = gradient("policy", value_coefficient=0.0), gradient("both", value_coefficient=0.5)
    more = gradient("more", value_coefficient=1.0)
    for name in both:
        torch.testing.assert_close(both[name] - policy[name], (more[name] - policy[name]) / 2, rtol=1e-3, atol=1e-6)
    assert any((both[name] - policy[name]).abs().max() > 1e-4 for name in both if "layers" in name)


def test_text_of_the_pre_training_mix_is_learned_beside_it(tiny_world, runtime, tmp_path):
    make(tiny_world, runtime, tmp_path, steps=2, ptx_data=[tiny_world["sft"]], ptx_coefficient=0.5).train()
    assert all(row["ptx_loss"] > 0 for row in read_metrics(tmp_path) if "policy_loss" in row)


def test_a_live_value_head_model_is_trained_with_given_rewards(tiny_world, runtime, tmp_path):
    class Short(Reward):
        name = "short"

        def score(self, samples):
            return torch.tensor([-float(len(sample.response)) for sample in samples])

    base = AutoModelForCausalLM.from_pretrained(tiny_world["policy"])
    policy, head = AutoModelForCausalLMWithValueHead(base), "v_head.summary.weight"
    before = policy.state_dict()[head].clone()
    changes = dict(model=None, rewards=[], steps=2)
    trainer = make(tiny_world, runtime, tmp_path, policy=policy, given=[Short()], **changes)
    trainer.train()
    assert not torch.equal(policy.state_dict()[head], before)
    assert trainer.reference.engine.module.model is not base
    first = next(row for row in read_metrics(tmp_path) if "kl" in row)
    assert first["kl"] == 0 and "reward/short" in first


def test_policy_critic_and_reward_are_adapters_and_heads_on_one_model(tiny_world, runtime, tmp_path):
    """One set of base weights: the policy's adapter, a value head, a reward adapter; the reference with all off."""
    from peft import LoraConfig, get_peft_model

    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_world["policy"], num_labels=1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    get_peft_model(classifier, lora).save_pretrained(tmp_path / "reward")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    options = dict(peft_config=lora, reward_adapter=str(tmp_path / "reward"))
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_world["policy"], **options)
    changes = dict(model=None, rewards=[], steps=2)
    trainer = make(tiny_world, runtime, tmp_path / "run", policy=policy, given=[AdapterReward(policy)], **changes)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.train()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert trainer.reference.engine is trainer.actor
    assert moved and all(".default." in name or name.startswith("v_head") for name in moved)
    rows = [row for row in read_metrics(tmp_path / "run") if "kl" in row]
    assert rows[0]["kl"] == 0 and rows[1]["kl"] != 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(tensor_parallel=2), "shared_trunk runs under ddp"),
        (dict(critic_model="somewhere"), "no critic_model"),
        (dict(learning_rate=0.0), "learning_rate above 0"),
    ],
)
def test_what_it_cannot_do_is_said_at_the_start(changes, words, tiny_world):
    settings = settings_for("ppo", tiny_world, output_dir="unused", shared_trunk=True, **changes)
    with pytest.raises(UserError, match=words):
        configure(PPOConfig, **settings)


def test_a_value_head_model_without_a_shared_trunk_is_refused(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="set shared_trunk"):
        PPOTrainer(
            configure(PPOConfig, **settings_for("ppo", tiny_world, output_dir=str(tmp_path))), runtime, policy=object()
        )
