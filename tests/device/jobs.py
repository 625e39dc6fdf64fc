"""Runs for the strict device."""

from pathlib import Path

from tests.conftest import reward_model, settings_for

SAMPLING = dict(top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, min_new_tokens=2, temperature=0.7)
# name: the algorithm and settings that take other ways through the code
RUNS = {
    "sft": ("sft", {}),
    "sft, lora": ("sft", dict(lora_rank=4)),
    "sft, checkpointing": ("sft", dict(gradient_checkpointing=True)),
    "sft, long rows": ("sft", dict(gradient_checkpointing=True, offload_activations=True, feed_forward_tokens=8)),
    "sft, bf16": ("sft", dict(precision="bf16")),
    "reward": ("reward", dict(use_margin=True, centering=0.01)),
    "reward, shared prompts": ("reward", dict(share_prompts=True)),
    "dpo": ("preference", dict(share_prompts=True)),
    "dpo, prompts apart": ("preference", {}),
    "kto": ("preference", dict(algorithm="kto")),
    "ppo": ("ppo", dict(scored_by_model=True, temperature=1.0)),
    "ppo, shared trunk": ("ppo", dict(SAMPLING, shared_trunk=True, dual_clip=3.0, kl_stop=0.1)),
    "grpo": ("grpo", {}),
    "grpo, dynamic": ("grpo", dict(SAMPLING, dynamic_sampling=True, weights="token", reject="sequence")),
    "grpo, shared prompts": (
        "grpo",
        dict(share_prompts=True, kl_coefficient=0.1, entropy_coefficient=0.01, overlong_buffer=4, refresh_reference=1),
    ),
    "grpo, remax": ("grpo", dict(advantage="remax", kl_coefficient=0.1, kl_in="reward")),
}


def sizes(run: str, times: int = 1, micro_batches: int = 1, updates: int = 1) -> dict:
    """Settings of a step of `times` as many rows, in so many micro-batches and updates, without evaluation."""
    algorithm, _ = RUNS[run]
    generates = algorithm in ("ppo", "grpo")
    batch_size = times * (4 if generates else 8)
    rows = batch_size * (2 if algorithm == "grpo" else 1)  # two responses per prompt
    of_updates = dict(minibatches=1, ppo_epochs=updates) if generates else {}
    return dict(batch_size=batch_size, micro_batch_size=rows // micro_batches, eval_data=[]) | of_updates


def make_job(name: str, run: str, world: dict[str, str], folder: Path, /, **changes) -> dict:
    """One step of a run of `RUNS`, with fewer responses than other tests have; the output goes to FOLDER/NAME."""
    algorithm, of_run = RUNS[run]
    changes = of_run | changes
    settings = settings_for(algorithm, world, output_dir=str(folder / name), steps=1, samples=2)
    if algorithm in ("ppo", "grpo"):
        settings |= dict(batch_size=4, minibatches=2, max_new_tokens=6)
    if algorithm == "grpo":
        settings |= dict(group_size=2)
    if "lora_rank" in changes:
        settings |= dict(model=world["policy"], model_config=None)
    if changes.pop("scored_by_model", False):
        settings |= dict(rewards=[reward_model(world["scorer"])])
    return {"algorithm": algorithm, "settings": settings | changes}
