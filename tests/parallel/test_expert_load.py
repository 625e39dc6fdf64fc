"""How often each expert is chosen: counted as a plain loop does, whatever padding, micro-batches and adapters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.errors import UserError
from coati.losses import cross_entropy
from coati.models import Actor, LoraSettings
from coati.parallel import PluginConfig
from coati.parallel.factory import make_engine
from tests.distributed.world import family_config

ROWS = [[5, 9, 13, 21, 34], [7, 22, 31, 8, 3, 17, 40, 11], [4, 6, 44], [50, 12, 9, 9, 9, 9]]


def engine_of(family: str, runtime, lora=None, **settings):
    torch.manual_seed(0)
    model = Actor(config=family_config(family, 60), lora=lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return make_engine(model, PluginConfig(), runtime, optimizer={}, **settings)


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
    return {name: value for name, value in update.metrics.items() if "expert" in name or "router" in name}


def looped(engine) -> dict[str, float]:
    """The same of one row after the other, counted in a plain loop."""
    with torch.no_grad():
        observed = logits_and_choices(engine)
    seen = [chosen.tolist() for _, chosen in observed]
    is_sigmoid = engine.module.config.model_type in ("glm4_moe", "deepseek_v3")
    sure = [entropy_of(row, is_sigmoid) for logits, _ in observed for row in logits.tolist()]
    worst, entropies, idle, number = 0.0, [], 0, 0
    for counts in seen:
        load = [sum(expert in chosen for chosen in counts) for expert in range(4)]
        total = sum(load)
        worst = max(worst, max(load) * 4 / total)
        entropies.append(-sum(n / total * math.log(n / total) for n in load if n) / math.log(4))
        idle, number = idle + load.count(0), number + 4
    mean = sum(entropies) / len(entropies)
    load = {"expert_load_max": worst, "expert_load_entropy": mean, "experts_idle": idle / number}
    return load | {"router_entropy": sum(sure) / len(sure)}


def entropy_of(logits: list[float], is_sigmoid: bool) -> float:
    """Of a router's probabilities of four experts for a token, over that of even ones."""
    scores = [1 / (1 + math.exp(-x)) if is_sigmoid else math.exp(x) for x in logits]
    return -sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores) / math.log(4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "gpt_oss"])
def test_the_load_is_that_of_a_plain_loop(family, runtime):
    engine = engine_of(family, runtime)
    expected = looped(engine)
    assert expected["expert_load_max"] > 1.05 and expected["expert_load_entropy"] < 1
    assert expected["router_entropy"] < 0.999
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


def logits_of(router, hidden: torch.Tensor) -> torch.Tensor:
    """`[tokens, experts]`, from a router's weights."""
    return torch.nn.functional.linear(hidden.flatten(0, -2), router.weight, getattr(router, "bias", None))


def logits_and_choices(engine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each router for all tokens, one row after the other: its logits, with gradient, and its choices."""
    found: list[list] = []
    hooks = []
    for router in (m for m in engine.module.modules() if type(m).__name__.lower().endswith("topkrouter")):
        found.append([])
        note = lambda m, inputs, output, to=found[-1]: to.append((logits_of(m, inputs[0]), output[2]))  # noqa: E731
        hooks.append(router.register_forward_hook(note))
    for row in ROWS:
        engine.module(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    return [(torch.cat([a for a, _ in one]), torch.cat([b for _, b in one])) for one in found]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_loss_is_the_papers_and_its_gradient_too(family, runtime):
    """2101.03961, eq. 4 to 6, in a float64 loop; shares are those of the step before, first even ones."""
    engine = engine_of(family, runtime, router_loss=0.5)
    routers = [p for name, p in engine.module.named_parameters() if name.endswith("mlp.gate.weight")]
    found = logits_and_choices(engine)
    with torch.no_grad():
        expected, shares = 0.0, []
        for logits, chosen in found:
            wide = logits.double()
            scores = wide.sigmoid() if family == "deepseek_v3" else wide.softmax(-1)
            probabilities = [[float(s) / float(sum(row)) for s in row] for row in scores]
            f = [float((chosen == e).sum()) / chosen.numel() for e in range(4)]
            p = [sum(row[e] for row in probabilities) / len(probabilities) for e in range(4)]
            expected += 4 * sum(a * b for a, b in zip(f, p, strict=True)) / len(found)
            shares.append(f)
    terms = []
    for (logits, _), f in zip(found, shares, strict=True):
        scores = logits.double().sigmoid() if family == "deepseek_v3" else logits.double().softmax(-1)
        terms.append(4 * (torch.tensor(f, dtype=torch.float64) @ (scores / scores.sum(-1, keepdim=True)).mean(0)))
    slopes = torch.autograd.grad(0.5 * torch.stack(terms).mean(), routers)
    first = load_of(engine, [4], [1], left=False)
    assert first["router_loss"] == pytest.approx(1.0, abs=1e-6)  # even shares
    assert [pytest.approx(f, abs=1e-6) for f in shares] == engine.expert_load.shares
    gradients = []
    for coefficient in (0.5, 0.0):
        engine.expert_load.coefficient = coefficient or 1e-30
        keep = {}
        step = engine.step
        engine.step = lambda rate, finite, keep=keep, step=step: (
            keep.update({i: p.grad.clone() for i, p in enumerate(routers)}),
            step(rate, finite),
        )[1]
        second = load_of(engine, [1, 3], [12, 1], left=False)
        engine.step = step
        gradients.append([keep[i] for i in range(len(routers))])
    assert second["router_loss"] == pytest.approx(expected, rel=1e-5)
    for with_loss, without, slope in zip(*gradients, slopes, strict=True):
        torch.testing.assert_close(with_loss - without, slope.float(), rtol=1e-3, atol=1e-6)
        assert slope.abs().max() > 1e-5


def test_it_is_transformers_own_where_that_is_one_layers(runtime):
    """Theirs adds shares and probabilities up over layers first, and counts each of k choices: for one layer, k
    times as much."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = family_config("mixtral", 60)
    config.num_hidden_layers = 1
    torch.manual_seed(1)
    engine = make_engine(Actor(config=config), PluginConfig(), runtime, optimizer={}, router_loss=0.1)
    ((logits, _),) = logits_and_choices(engine)
    for _ in range(2):
        found = load_of(engine, [4], [1], left=False)
    theirs = load_balancing_loss_func((logits,), 4, top_k=2)
    assert found["router_loss"] == pytest.approx(theirs.item() / 2, rel=1e-5)


def test_prompts_that_are_read_once_count_for_each_of_their_rows(runtime):
    """Two rows that begin alike, read as one."""
    found = []
    ids = torch.tensor([[5, 9, 13, 21, 34, 2], [5, 9, 13, 40, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    for group in (1, 2):
        engine = engine_of("mixtral", runtime)
        with engine.update(0.0) as update:
            update.add(
                [ids],
                lambda x, group=group: dict(input_ids=x, attention_mask=mask, targets=mask, shared_prefix_group=group),
                lambda log_probs, batch, count: cross_entropy(log_probs, mask, count),
                lambda batch: mask[:, 1:].sum(),
            )
        found.append({name: value for name, value in update.metrics.items() if "expert" in name or "router" in name})
    assert found[0] == pytest.approx(found[1], rel=1e-6) and len(found[0]) == 4


def test_a_loss_for_what_has_no_experts_is_refused(runtime):
    with pytest.raises(UserError, match=r"router_loss is 0.1, and this model has no experts"):
        engine_of("llama", runtime, router_loss=0.1)
