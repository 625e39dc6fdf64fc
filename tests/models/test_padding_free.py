"""Rows that are read one after the other, without their padding: the same outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.distillation import Student, Teacher
from coati.models.packed import PackedRows, check_isolation
from coati.parallel.expert_load import ExpertLoad
from tests.models.families import model_of, padded, rows

FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "phi", "gemma", "qwen2_moe", "deepseek_v3")  # mistral has windows of 6
LENGTHS = (13, 4, 1, 9)


def both_ways(model, *inputs, **options) -> list[list[torch.Tensor]]:
    """The output and all gradients, with padding and without; of outputs at padding nothing is asked."""
    found = []
    for model.padding_free in (False, True):
        model.zero_grad()
        output = model(*inputs, **options)
        real = inputs[1] if output.shape[:2] == inputs[1].shape else torch.ones(output.shape[:1], dtype=torch.bool)
        output = torch.where(real.reshape(*real.shape, *(1 for _ in output.shape[real.ndim :])), output, 0.0)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    return found


def assert_alike(with_padding: list[torch.Tensor], without: list[torch.Tensor]):
    assert len(without) == len(with_padding) > 5
    for one, other in zip(without, with_padding, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_padded_rows(family, side):
    ids, mask = padded(rows(lengths=LENGTHS), side, extra=2)
    begins = mask & (mask.long().cumsum(1) == 1)  # nothing predicts a row's first token
    targets = mask & ~begins & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    model = model_of(Actor, family)
    assert_alike(*both_ways(model, ids, mask, targets=targets, right_padded=side == "right"))
    if side == "right":  # without targets, entry 0 of a row is the log-prob of no token
        assert_alike(*both_ways(model, ids, mask))


@pytest.mark.parametrize("model_class", [Critic, RewardModel, Student])
def test_so_do_the_other_models(model_class):
    ids, mask = padded(rows(lengths=LENGTHS), "right")
    assert_alike(*both_ways(model_of(model_class, lora=LoraSettings(4)), ids, mask, right_padded=True))
    teacher = model_of(Teacher)
    assert_alike(*both_ways(teacher, ids, mask, targets=mask, right_padded=True))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), extra=st.integers(0, 3), seed=st.integers(0, 9))
def test_any_rows_in_any_order(lengths, extra, seed):
    tokens = rows(seed, tuple(lengths))
    packed = PackedRows.from_rows(*padded(tokens, "right", extra))
    assert packed.input_ids[0].tolist() == [int(token) for row in tokens for token in row]
    assert packed.position_ids[0].tolist() == [place for row in tokens for place in range(len(row))]
    ids, mask = padded(tokens, "right", extra)
    assert torch.equal(packed.unpack(packed.input_ids)[mask], ids[mask])
    assert torch.equal(packed.pack(ids), packed.input_ids)


def test_a_kernel_is_told_where_rows_end():
    packed = PackedRows.from_rows(*padded(rows(lengths=(3, 5, 1)), "right"))
    inputs = packed.inputs("flash_attention_2")
    assert inputs["attention_mask"] is None
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert inputs[name].tolist() == [0, 3, 8, 9] and inputs[name].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5
    assert set(packed.inputs("sdpa")) == {"input_ids", "attention_mask", "position_ids"}


def test_experts_are_counted_alike():
    ids, mask = padded(rows(lengths=LENGTHS), "right", extra=3)
    found = []
    for padding_free in (False, True):
        model = model_of(Actor, "qwen2_moe").train()
        load, model.padding_free = ExpertLoad(model, 0.1), padding_free
        load.tokens = float(mask.sum())
        model(ids, attention_mask=mask, right_padded=True)
        found.append((float(load.loss()), {layer: counts.tolist() for layer, counts in load.counts.items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][1] == found[0][1]


def test_experts_are_replayed_alike():
    ids, mask = padded(rows(lengths=LENGTHS), "right", extra=3)
    generator = torch.Generator().manual_seed(0)
    routing = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(ids.numel() * 3)])
    routing = routing.view(*ids.shape, 3, 2)
    options = dict(targets=mask, routing=routing, right_padded=True)
    assert_alike(*both_ways(model_of(Actor, "mixtral"), ids, mask, **options))


@pytest.mark.parametrize(
    ("family", "isolates"), [("llama", True), ("qwen2_moe", True), ("opt", False), ("bloom", False), ("mamba", False)]
)
def test_models_whose_rows_would_see_one_another_are_refused(family, isolates, runtime):
    for model_class in (Actor, RewardModel, Teacher):
        model = model_of(model_class, family)
        model.padding_free = True
        wanted = dict(wants_targets=model_class is Teacher)

        def forward_all(inputs, model=model):
            with torch.no_grad():
                return [model(**one) for one in inputs]

        if isolates:
            check_isolation(model, forward_all, runtime.device, **wanted)
            continue
        with pytest.raises(UserError, match=r"with .* attention can't read rows without padding: leave padding_"):
            check_isolation(model, forward_all, runtime.device, **wanted)


def test_a_leak_is_found(monkeypatch, runtime):
    """What a model does that ignores where documents begin."""
    model = model_of(Actor)
    model.padding_free = True
    as_one_document = torch.arange(100)
    inputs_of = PackedRows.inputs
    monkeypatch.setattr(
        PackedRows,
        "inputs",
        lambda self, attention: (
            inputs_of(self, attention) | {"position_ids": as_one_document[None, : self.input_ids.shape[1]]}
        ),
    )
    with pytest.raises(UserError, match="leave padding_free out"):
        check_isolation(model, lambda inputs: [model(**one) for one in inputs], runtime.device)
