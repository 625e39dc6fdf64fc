"""Writes trl_grpo.json: what TRL's own code gives for advantages and losses, run by a python that has TRL.

    .venv-trl-1.16/bin/python tests/losses/make_trl_grpo.py

`GRPOTrainer._compute_loss` is called on a bare object whose model gives the log-probs below. The advantages, and the
correction for vLLM, are lines within longer methods: these very lines are taken from TRL's source and run.
"""

import inspect
import json
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer import grpo_trainer, rloo_trainer

SIZE, LONGEST = 3, 8  # of a group; max_completion_length
OPTIONS = {
    "grpo": dict(loss_type="grpo", beta=0.0),
    "grpo with KL": dict(loss_type="grpo", beta=0.04),
    "dr_grpo": dict(loss_type="dr_grpo", beta=0.0),
    "dapo": dict(loss_type="dapo", beta=0.0, epsilon_high=0.28),
    "dapo with KL": dict(loss_type="dapo", beta=0.1),
    "cispo": dict(loss_type="cispo", beta=0.0, epsilon_high=2.0),
    "gspo": dict(loss_type="grpo", beta=0.0, importance_sampling_level="sequence", epsilon_low=3e-2, epsilon_high=4e-2),
    "truncated": dict(loss_type="dapo", beta=0.0, use_vllm=True, mode="token_truncate"),
    "masked": dict(loss_type="grpo", beta=0.0, use_vllm=True, mode="token_mask"),
    "sequence truncated": dict(loss_type="dapo", beta=0.0, use_vllm=True, mode="sequence_truncate"),
    "sequence masked": dict(loss_type="grpo", beta=0.04, use_vllm=True, mode="sequence_mask"),
    "off-policy mask": dict(loss_type="grpo", beta=0.04, off_policy_bound=-0.4),  # one of two bad responses
    "luspo": dict(
        loss_type="luspo", beta=0.0, importance_sampling_level="sequence", epsilon_low=3e-2, epsilon_high=4e-2
    ),
    "vespo": dict(loss_type="vespo", beta=0.0),
    "sapo": dict(loss_type="sapo", beta=0.0),
}
VESPO = dict(vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)  # the defaults
SAPO = dict(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)


def lines(method, first: str, last: str) -> str:
    """The lines of a method's source from the one that starts with `first` to the one that starts with `last`."""
    source = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(source) if i > start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(source[start : end + 1]))


def advantages(rewards: torch.Tensor) -> dict[str, list[float]]:
    found = {}
    for name, scale in (("grpo", "group"), ("dr_grpo", "none")):
        me = SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards=scale)
        me.reward_weights = torch.ones(1, dtype=rewards.dtype)
        names = dict(self=me, rewards_per_func=rewards[:, None], num_generations=SIZE, device="cpu", torch=torch)
        names |= dict(nanstd=grpo_trainer.nanstd, unscorable_mask=torch.zeros(len(rewards), dtype=torch.bool))
        code = lines(
            grpo_trainer.GRPOTrainer._generate_and_score_completions,
            "if self.multi_objective_aggregation ==",
            "advantages = torch.nan_to_num",
        )
        exec(code, names)
        found[name] = names["advantages"].tolist()
    me = SimpleNamespace(normalize_advantages=False)
    names = dict(self=me, rewards=rewards, num_generations=SIZE, torch=torch, nanstd=rloo_trainer.nanstd)
    code = lines(
        rloo_trainer.RLOOTrainer._generate_and_score_completions,
        "grouped_rewards = rewards.view",
        "advantages = torch.nan_to_num",
    )
    exec(code, names)
    return found | {"rloo": names["advantages"].tolist()}


def decoupled_advantages(rewards: torch.Tensor, weights: torch.Tensor) -> list[float]:
    """GDPO's, of `rewards` `[batch, kinds]`."""
    me = SimpleNamespace(multi_objective_aggregation="normalize_then_sum", reward_weights=weights, reward_funcs=weights)
    names = dict(self=me, rewards_per_func=rewards, num_generations=SIZE, device="cpu", torch=torch)
    names |= dict(nanstd=grpo_trainer.nanstd, unscorable_mask=torch.zeros(len(rewards), dtype=torch.bool))
    method = grpo_trainer.GRPOTrainer._generate_and_score_completions
    exec(lines(method, "if self.multi_objective_aggregation ==", "advantages = torch.nan_to_num"), names)
    return names["advantages"].tolist()


def bare_trainer(log_probs, loss_type, beta, epsilon_low=0.2, epsilon_high=0.2, mode="token_truncate", **more):
    me = object.__new__(grpo_trainer.GRPOTrainer)
    me.loss_type, me.beta, me.epsilon_low, me.epsilon_high = loss_type, beta, epsilon_low, epsilon_high
    me.importance_sampling_level = more.get("importance_sampling_level", "token")
    me.use_vllm, me.vllm_importance_sampling_correction = more.get("use_vllm", False), True
    me.vllm_importance_sampling_mode = mode
    me.vllm_importance_sampling_clip_min = 0.5 if mode.endswith("mask") else None
    me.vllm_importance_sampling_clip_max = 2.0
    me.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1, **VESPO, **SAPO)
    me.off_policy_mask_threshold, me.top_entropy_quantile = more.get("off_policy_bound"), 1.0
    me.aux_loss_enabled = me._entropy_bonus_enabled = False
    me.current_gradient_accumulation_steps, me.max_completion_length = 1, LONGEST
    me.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    me.model, me._metrics = SimpleNamespace(training=True), {"train": defaultdict(list)}
    me._get_per_token_logps_and_entropies = lambda *a, **k: (log_probs, torch.zeros_like(log_probs), None)
    return me


def loss(case: dict, **options) -> dict:
    tensors = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("old", "reference", "rollout")}
    log_probs = torch.tensor(case["log_probs"], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(case["mask"])
    me = bare_trainer(log_probs, **options)
    empty = torch.zeros(len(mask), 0, dtype=torch.long)
    inputs = dict(prompt_ids=empty, prompt_mask=empty, completion_ids=mask.long(), completion_mask=mask.long())
    inputs |= dict(advantages=torch.tensor(case["advantages"], dtype=torch.float64), num_items_in_batch=mask.sum())
    inputs |= dict(old_per_token_logps=tensors["old"], ref_per_token_logps=tensors["reference"])
    if me.off_policy_mask_threshold is not None:
        inputs["sampling_per_token_logps"] = tensors["rollout"]
    if me.use_vllm:
        names = dict(self=me, torch=torch, math=math, completion_mask=mask.long(), tool_mask=None)
        names |= dict(old_per_token_logps=tensors["old"], sampling_per_token_logps=tensors["rollout"])
        method = grpo_trainer.GRPOTrainer._generate_and_score_completions
        exec(lines(method, "mask = completion_mask if tool_mask is None", "raise ValueError") + "\n    )", names)
        inputs["importance_sampling_ratio"] = names["vllm_importance_sampling_ratio"]
    result = me._compute_loss(me.model, inputs)
    result.backward()
    return {"loss": result.item(), "gradient": log_probs.grad.tolist()}


def main():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([3, 8, 1, 5, 8, 2])
    mask = torch.arange(LONGEST) < lengths[:, None]
    old = -normal(6, LONGEST).abs() * 3
    case = {"mask": mask.tolist(), "old": old.tolist(), "advantages": normal(6).tolist()}
    case["log_probs"] = (old + 0.4 * normal(6, LONGEST)).tolist()
    case["reference"] = (old + 0.5 * normal(6, LONGEST)).tolist()
    case["rollout"] = (old + 0.6 * normal(6, LONGEST)).tolist()
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 0.3, -4.0, 7.5], dtype=torch.float64)
    origin = f"TRL {trl.__version__}, torch {torch.__version__}: tests/losses/make_trl_grpo.py"
    page = {"origin": origin, "group_size": SIZE, "longest": LONGEST, "rewards": rewards.tolist()}
    page |= {"advantages": advantages(rewards), "case": case}
    kinds, weights = normal(9, 3), torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    kinds[3:6, 1] = 0.7  # a group whose responses all earn the same
    page["decoupled"] = {"rewards": kinds.tolist(), "weights": weights.tolist()}
    page["decoupled"]["advantages"] = decoupled_advantages(kinds, weights)
    page["losses"] = {name: {"options": options, **loss(case, **options)} for name, options in OPTIONS.items()}
    Path(__file__).with_name("trl_grpo.json").write_text(json.dumps(page, indent=1) + "\n")


if __name__ == "__main__":
    main()
