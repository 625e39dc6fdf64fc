"""How often each expert is chosen: counted as a plain loop does, whatever padding, micro-batches and adapters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.losses import cross_entropy
from coati.models import Actor, LoraSettings
from coati.parallel import PluginConfig
from coati.parallel.factory import make_engine
from tests.distributed.world import family_config

ROWS = [[5, 9, 13, 21, 34], [7, 22, 31, 8, 3, 17, 40, 11], [4, 6, 44], [50, 12, 9, 9, 9, 9]]


def engine_of(family: str, runtime, lora=None):
    torch.manual_seed(0)
    model = Actor(config=family_config(family, 60), lora=lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return make_engine(model, PluginConfig(), runtime, optimizer={}, accumulates=True)


def load_of(engine, sizes: list[int], widths: list[int], left: bool) -> dict[str, float]:
    """Of a step on these rows in micro-batches of so many rows, padded to these widths at least."""
    batches, first = [], 0
    for size, width in zip(sizes, widths, strict=True):
        rows = ROWS[first : first + size]
        first += size
        width = max([width, *map(len, rows)])
        filler = [[0] * (width - len(row)) for row in rows]
        ids = torch.tensor([f + row if left else row + f for row, f in zip(rows, filler, strict=True)])
        real = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
                for row, f in zip(rows, filler, strict=True)]  # fmt: skip
        batches.append((ids, torch.tensor(real, dtype=torch.bool)))
    with engine.update(0.0) as update:
        update.add(
            batches,
            lambda batch: {"input_ids": batch[0], "attention_mask": batch[1], "targets": batch[1]},
            lambda log_probs, batch, count: cross_entropy(log_probs, batch[1], count),
            lambda batch: batch[1][:, 1:].sum(),
        )
    return {name: value for name, value in update.metrics.items() if "expert" in name}


def looped(engine) -> dict[str, float]:
    """The same of one row after the other, counted in a plain loop."""
    seen: list[list[list[int]]] = []
    hooks = []
    routers = [m for m in engine.module.modules() if type(m).__name__.lower().endswith("topkrouter")]
    for router in routers:
        counts: list[list[int]] = []
        seen.append(counts)
        hooks.append(
            router.register_forward_hook(lambda m, i, output, counts=counts: counts.extend(output[2].tolist()))
        )
    with torch.no_grad():
        for row in ROWS:
            engine.module(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    worst, entropies, idle, number = 0.0, [], 0, 0
    for counts in seen:
        load = [sum(expert in chosen for chosen in counts) for expert in range(4)]
        total = sum(load)
        worst = max(worst, max(load) * 4 / total)
        entropies.append(-sum(n / total * math.log(n / total) for n in load if n) / math.log(4))
        idle, number = idle + load.count(0), number + 4
    mean = sum(entropies) / len(entropies)
    return {"expert_load_max": worst, "expert_load_entropy": mean, "experts_idle": idle / number}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "gpt_oss"])
def test_the_load_is_that_of_a_plain_loop(family, runtime):
    engine = engine_of(family, runtime)
    expected = looped(engine)
    assert expected["expert_load_max"] > 1.05 and expected["expert_load_entropy"] < 1
    for left in (False, True):
        assert load_of(engine, [4], [9], left) == pytest.approx(expected, rel=1e-6)


@given(st.sampled_from([[4], [1, 3], [2, 2], [1, 1, 1, 1]]), st.lists(st.integers(1, 14), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_neither_padding_nor_micro_batches_change_it(one_engine, sizes, widths):
    engine, expected = one_engine
    assert load_of(engine, sizes, widths[: len(sizes)], left=False) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def one_engine(runtime):
    engine = engine_of("qwen3_moe", runtime)
    return engine, looped(engine)


def test_adapters_of_experts_and_recomputation_leave_it_alone(runtime):
    expected = looped(engine_of("mixtral", runtime))
    adapted = engine_of("mixtral", runtime, LoraSettings(rank=2, target_modules=["q_proj", "gate_up_proj"]))
    adapted.module.enable_gradient_checkpointing()
    assert load_of(adapted, [2, 2], [1, 1], left=False).keys() == expected.keys()
    assert load_of(adapted, [4], [1], left=False) == pytest.approx(looped(adapted), rel=1e-6)


def test_without_experts_there_is_none(runtime):
    assert load_of(engine_of("llama", runtime), [4], [1], left=False) == {}
