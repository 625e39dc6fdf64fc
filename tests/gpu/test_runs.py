"""Whole runs of every algorithm under every plugin and precision on one GPU; resuming; the planner's word."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import ROOT, settings_for, trainer_classes

ALGORITHMS = ("sft", "reward", "preference", "ppo", "grpo")
LAYOUTS = {
    "ddp fp32": dict(plugin="ddp", precision="fp32"),
    "ddp bf16": dict(plugin="ddp", precision="bf16"),
    "ddp fp16": dict(plugin="ddp", precision="fp16"),
    "zero2 fp32": dict(plugin="zero2", precision="fp32"),
    "zero2 bf16": dict(plugin="zero2", precision="bf16"),
    "zero2 fp16": dict(plugin="zero2", precision="fp16"),
    "zero2-offload bf16": dict(plugin="zero2-offload", precision="bf16"),
    "gemini bf16": dict(plugin="gemini", precision="bf16"),
    "gemini fp16": dict(plugin="gemini", precision="fp16"),
    "gemini bf16 offloaded": dict(
        plugin="gemini", precision="bf16", offload_optimizer_fraction=1.0, offload_parameter_fraction=0.5
    ),
}
ON_CPU = ("ddp fp32", "zero2 bf16", "gemini bf16")


def layouts(device) -> list[str]:
    return list(LAYOUTS) if device == "cuda" else list(ON_CPU)


DEVICE = os.environ.get("COATI_TEST_DEVICE", "cpu")
COMPARED = {"loss": 2, "grad_norm": 1}  # up to which step: Adam turns small gradients into whole steps
# how far a logged number may be from the CPU's in float32, over the first steps
CLOSE = {"fp32": 2e-3, "bf16": 0.15, "fp16": 0.05}


def make(algorithm: str, world, runtime, output: Path, layout: str, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), **LAYOUTS[layout], **changes)
    return trainer_class(configure(config_class, **settings), runtime)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{p.parent.name}/{k}": v for p in sorted(folder.rglob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.fixture(scope="module")
def on_the_cpu(tiny_world, tmp_path_factory) -> dict[str, list[dict]]:
    """The metrics of runs in float32 in a process that sees no GPU."""
    folder = tmp_path_factory.mktemp("cpu")
    job = {"world": tiny_world, "folder": str(folder), "algorithms": ["sft", "reward", "preference"]}
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", COATI_TEST_DEVICE="cpu", OMP_NUM_THREADS="4")
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT}/applications"
    command = [sys.executable, "-m", "tests.gpu.reference", json.dumps(job)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return {name: read_metrics(folder / name) for name in job["algorithms"]}


@pytest.mark.skipif(DEVICE != "cuda", reason="the allocator is CUDA's")
def test_the_allocators_segments_can_grow(runtime):
    torch.ones(1, device=runtime.device)
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]


@pytest.mark.parametrize("layout", layouts(DEVICE))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_learns_as_on_a_cpu(algorithm, layout, tiny_world, runtime, tmp_path, on_the_cpu, figure):
    """Finite, all files there; SFT, reward model and DPO with the numbers of a CPU in float32."""
    make(algorithm, tiny_world, runtime, tmp_path / "run", layout).train()
    rows = read_metrics(tmp_path / "run")
    logged = [row for row in rows if any(name in row for name in ("loss", "policy_loss"))]
    assert len(logged) == 4
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    if "rollout_kl" in rows[1]:
        figure(f"rollout_kl of {algorithm} {layout}", max(row["rollout_kl"] for row in rows if "rollout_kl" in row))
    if algorithm not in on_the_cpu:
        return
    worst = max(
        abs(found[name] - expected[name]) / max(abs(expected[name]), 0.1)
        for found, expected in zip(rows, on_the_cpu[algorithm], strict=True)
        for name, last in COMPARED.items()
        if name in expected and expected["step"] <= last
    )
    figure(f"furthest from the CPU: {algorithm} {layout}", float(f"{worst:.2g}"))
    assert worst < CLOSE[LAYOUTS[layout]["precision"]]


@pytest.mark.parametrize("layout", layouts(DEVICE))
@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_resumed_run_is_the_uninterrupted_one(algorithm, layout, tiny_world, runtime, tmp_path, figure):
    """To the last bit, with deterministic kernels."""
    changes = dict(steps=6, save_every=3, keep_checkpoints=9, deterministic=True)
    if algorithm == "ppo":
        changes |= dict(temperature=1.0, kl_target=0.5, kl_horizon=50, normalize_reward=True)
    make(algorithm, tiny_world, runtime, tmp_path / "whole", layout, **changes).train()
    middle = tmp_path / "whole" / "checkpoints" / "step-00000003"
    make(algorithm, tiny_world, runtime, tmp_path / "resumed", layout, resume=str(middle), **changes).train()
    expected, found = weights(tmp_path / "whole" / "model"), weights(tmp_path / "resumed" / "model")
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    figure(f"weights that differ after a resume: {algorithm} {layout}", f"{len(different)} of {len(expected)}")
    assert not different


@pytest.mark.parametrize(
    "changes",
    [
        dict(shared_trunk=True, plugin="zero2", precision="bf16"),
        dict(lora_rank=4, plugin="ddp", precision="bf16"),
        dict(lora_rank=4, plugin="zero2", precision="bf16"),
        dict(gradient_checkpointing=True, plugin="zero2", precision="bf16"),
        dict(gradient_checkpointing=True, offload_activations=True, feed_forward_tokens=8, plugin="zero2"),
        dict(lora_rank=4, quantize_base="nf4", plugin="zero2", precision="bf16"),
        dict(padding_free=True, attn_implementation="flex_attention", plugin="zero2", precision="bf16"),
    ],
    ids=str,
)
def test_ppo_runs_with(changes, tiny_world, runtime, tmp_path):
    config_class, trainer_class = trainer_classes("ppo")
    settings = settings_for("ppo", tiny_world, output_dir=str(tmp_path / "run"), temperature=1.0, **changes)
    trainer_class(configure(config_class, **settings), runtime).train()
    rows = read_metrics(tmp_path / "run")
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize(
    "changes",
    [
        dict(share_prompts=True),
        dict(dynamic_sampling=True, kl_coefficient=0.1, kl_in="reward"),
        dict(advantage="remax"),
        dict(
            weights="token", reject="geometric", off_policy_bound=0.5, policy_loss="gspo", clip_low=0.02, clip_high=0.02
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["ddp fp32", "zero2 bf16"])
def test_grpo_runs_with(changes, layout, tiny_world, runtime, tmp_path):
    make("grpo", tiny_world, runtime, tmp_path / "run", layout, **changes).train()
    rows = read_metrics(tmp_path / "run")
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_more_processes_than_gpus_is_one_clear_error():
    from coati.parallel.runtime import _select_device

    if DEVICE != "cuda":
        pytest.skip("is about GPUs")
    with pytest.raises(UserError, match="no GPU of its own"):
        _select_device(torch.cuda.device_count())
