"""Mixtures of experts: they sample what they train on, and training has no noise of its own."""

import pytest
import torch

from coati.models import Actor, AutoModelForCausalLMWithValueHead, Critic
from coati.models.base import disable_dropout
from coati.rollout import GenerationConfig, Request, RolloutEngine
from tests.models.families import GROUPED, SHARED, padded, rows, tiny_config

FOUR = dict(num_experts=4, num_experts_per_tok=2)
FOUR_LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
NOISY = dict(router_jitter_noise=0.3)
DBRX_EXPERTS = dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.3)
DBRX_ATTENTION = dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0)
MODELS = {
    "Mixtral": GROUPED | FOUR_LOCAL | NOISY,
    "Qwen2Moe": GROUPED | FOUR | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "Qwen3Moe": GROUPED | FOUR | dict(moe_intermediate_size=16, head_dim=8),
    "Olmoe": GROUPED | FOUR,
    "Phimoe": GROUPED | FOUR_LOCAL | dict(router_jitter_noise=0.1, input_jitter_noise=0.3),
    "GptOss": GROUPED
    | FOUR_LOCAL
    | dict(head_dim=8, sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "GraniteMoe": GROUPED | FOUR_LOCAL,
    "MiniMaxM2": GROUPED | FOUR_LOCAL | NOISY | dict(head_dim=8),
    "Ernie4_5_Moe": GROUPED | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "Dbrx": dict(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config=DBRX_ATTENTION, ffn_config=DBRX_EXPERTS
    ),
}
DRAWS = ("Mixtral", "Phimoe", "MiniMaxM2", "Dbrx")  # noise in training


def config_of(name: str):
    import transformers

    return getattr(transformers, f"{name}Config")(**{**SHARED, **MODELS[name], "output_router_logits": True})


def actor_of(name: str) -> Actor:
    torch.manual_seed(0)
    return Actor(config=config_of(name)).eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sampling_gives_the_log_probs_of_training(name):
    """REPORT 18: `output_router_logits` is for a loss that is none of ours; with it, sampling raised."""
    actor, prompts = actor_of(name), [[5, 9, 13], [7, 22, 31, 8, 3], [4]]
    config = GenerationConfig(max_new_tokens=12)
    done = RolloutEngine(actor, config, eos_ids=[2]).generate([Request(p, i) for i, p in enumerate(prompts)])
    for prompt, completion in zip(prompts, done, strict=True):
        log_probs = actor(torch.tensor([[*prompt, *completion.ids]]))[0, len(prompt) :]
        torch.testing.assert_close(log_probs, torch.tensor(completion.log_probs), rtol=1e-4, atol=1e-5)
    ids = torch.tensor([prompts[0]])
    assert actor.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("name", MODELS)
def test_a_policys_ratio_to_itself_is_one(name):
    """REPORT 18: routers that jitter or draw in training do neither once noise is taken out, and still learn."""
    actor, (ids, mask) = actor_of(name), padded(rows(), "right")
    with torch.no_grad():
        expected = actor(ids, mask)
        assert (name in DRAWS) == (not torch.equal(actor.train()(ids, mask), actor(ids, mask)))
    disable_dropout(actor)
    for mode in (True, False, True):
        actor.train(mode)
        assert torch.equal((actor(ids, mask) - expected).exp(), torch.ones_like(expected))
    assert all(module.training for module in actor.modules() if not any("jitter" in key for key in vars(module)))
    actor(ids, mask).sum().backward()
    routers = [p for key, p in actor.named_parameters() if key.endswith((".gate.weight", ".router.weight"))]
    assert all(p.grad.abs().sum() > 0 for p in routers)


def test_other_heads_read_experts_too(tmp_path):
    """REPORT 18: the critic, and a policy with a value head; the setting stays in what is saved."""
    ids, mask = padded(rows(), "right")
    config = config_of("Olmoe")
    critic = Critic(config=config).train()
    critic(ids, mask).sum().backward()
    assert len(critic.notes) == 1 and "router logits" in critic.notes[0]
    actor = actor_of("Olmoe")
    actor.save_pretrained(tmp_path)
    assert Actor(tmp_path).config.output_router_logits
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert policy(ids, attention_mask=mask.long())[2].shape == ids.shape
    assert Actor(config=tiny_config("llama")).notes == []
