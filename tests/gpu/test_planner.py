"""The planner's word beside what the allocator of a GPU has handed out."""

import gc
from pathlib import Path

import pytest
import torch

from tools.measure_memory import Case, flags, planned, world, write_world

SIZE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16, vocab_size=32000)
CASES = [
    Case("sft", 1, SIZE, {"plugin": "ddp", "precision": "bf16"}),
    Case("sft", 1, SIZE, {"plugin": "zero2", "precision": "bf16"}),
    Case("sft", 1, SIZE, {"plugin": "zero2", "precision": "bf16", "gradient_checkpointing": True}),
    Case("sft", 1, SIZE, {"plugin": "zero2-offload", "precision": "bf16"}),
    Case("sft", 1, SIZE, {"plugin": "gemini", "precision": "bf16"}),
    Case("reward", 1, SIZE, {"plugin": "zero2", "precision": "bf16"}),
    Case("ppo", 1, SIZE, {"plugin": "zero2", "precision": "bf16"}),
    Case("ppo", 1, SIZE, {"plugin": "gemini", "precision": "bf16"}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("planner")
    write_world(root / str(SIZE["hidden_size"]), SIZE)
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.algorithm} {case.name} {case.settings['plugin']}")
def test_a_plan_is_within_15_percent_of_the_peak(case, folder, runtime, device, figure, tmp_path):
    if device.type != "cuda":
        pytest.skip("measures a GPU's memory")
    from coati.config import parse_config
    from coati.trainers.algorithms import ALGORITHMS

    algorithm = ALGORITHMS[case.algorithm]
    config = parse_config(algorithm.config, flags(case, world(folder, SIZE), str(tmp_path)))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = algorithm.trainer()(config, runtime)
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        trainer.step(step)
        trainer.steps_done += 1
    measured = torch.cuda.max_memory_allocated() - before
    del trainer
    gc.collect()
    expected = planned(case, folder, on_gpu=True)
    figure(f"planned / measured, {case.algorithm} {case.settings['plugin']} {case.name}", round(expected / measured, 3))
    assert expected == pytest.approx(measured, rel=0.15)
