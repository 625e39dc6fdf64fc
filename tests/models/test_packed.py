"""Groups of rows whose common beginning is read once: the log-probs and gradients that the rows have alone."""

import shutil

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from coati.models import RewardModel
from coati.models.packed import PackedGroups
from tests.models.families import VOCABULARY, padded, tiny_config
from tests.models.test_actor import make

# of each group, the tokens that its rows share and what each adds
SHAPES = st.integers(1, 4).flatmap(
    lambda members: st.lists(st.tuples(*[st.integers(0, 6)] * (1 + members)), min_size=1, max_size=4)
)


def batch_of(shapes: list[tuple[int, ...]], seed: int = 0):
    """Groups of rows with at least one common token: `[members * groups, seq]`, the first rows of the groups first."""
    generator = torch.Generator().manual_seed(seed)
    members: list[list[torch.Tensor]] = [[] for _ in shapes[0][1:]]
    for shared, *rest in shapes:
        beginning = torch.randint(3, VOCABULARY, (shared + 1,), generator=generator)
        for rows, more in zip(members, rest, strict=True):
            rows.append(torch.cat([beginning, torch.randint(3, VOCABULARY, (more,), generator=generator)]))
    return padded([row for rows in members for row in rows], "right", extra=1)


def common_beginning(rows: list[list[int]]) -> int:
    alike = [len(set(tokens)) == 1 for tokens in zip(*rows, strict=False)]
    return [*alike, False].index(False)


@given(shapes=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_token_is_there_with_its_position_and_sees_its_own_row(shapes, seed):
    """Beside a loop over all tokens."""
    ids, mask = batch_of(shapes, seed)
    packed = PackedGroups.from_rows(ids, mask, len(shapes[0]) - 1)
    lengths, groups = mask.sum(1).tolist(), len(shapes)
    width = packed.input_ids.shape[1]
    assert torch.equal(create_mask(packed.sees, groups, None, width, width, device="cpu"), packed.visible)
    assert torch.equal(packed.unpack(packed.input_ids)[mask], ids[mask])
    assert torch.equal(packed.unpack(packed.position_ids)[mask], torch.arange(ids.shape[1]).expand_as(ids)[mask])
    for row, length in enumerate(lengths):
        packed_index = packed.packed_index[row, :length].tolist()
        assert len(set(packed_index)) == length
        for t in range(length):
            seen = packed.visible[row % groups, 0, packed_index[t]].nonzero()[:, 0].tolist()
            assert seen == sorted(packed_index[: t + 1])
    for i in range(groups):
        rows = [ids[row, : lengths[row]].tolist() for row in range(i, len(ids), groups)]
        used = set()
        for row in range(i, len(ids), groups):
            used.update(packed.packed_index[row, : lengths[row]].tolist())
        assert len(used) == sum(map(len, rows)) - (len(rows) - 1) * common_beginning(rows)


SOME = {2: [(9, 4, 6), (0, 1, 9), (3, 0, 5), (5, 4, 0)], 4: [(9, 4, 6, 0, 3), (0, 1, 9, 2, 2)]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="its kernel is compiled")
@pytest.mark.parametrize("members", SOME)
def test_a_mask_by_blocks_hides_what_the_square_one_does(members):
    """On a CPU forward only; tests/gpu has gradients."""
    torch._dynamo.reset()  # torch 2.13 compiles no kernel for a CPU that takes a second shape
    actor, (ids, mask) = make("llama", initializer_range=0.3).eval(), batch_of(SOME[members])
    expected = actor(ids, mask).detach()
    actor.model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        found = actor(ids, mask, shared_prefix_group=members)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("members", SOME)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
def test_log_probs_and_gradients_are_those_of_separate_rows(family, attention, members):
    capped = dict(final_logit_softcapping=1.0) if family == "gemma2" else {}
    if (family, attention) == ("gemma2", "sdpa"):
        if not transformers.Gemma2ForCausalLM._supports_sdpa:
            pytest.skip(f"transformers {transformers.__version__} has no sdpa for Gemma 2")
        capped |= dict(attn_logit_softcapping=None)  # sdpa has no cap
    actor = make(family, initializer_range=0.3, attn_implementation=attention, **capped).double()
    ids, mask = batch_of(SOME[members])
    targets = mask & (torch.arange(ids.shape[1]) > 0)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1)).double()

    def measure(**options):
        actor.zero_grad()
        log_probs = actor(ids, mask, **options)
        (log_probs * weights)[targets].sum().backward()
        return log_probs.detach()[targets], {name: p.grad.clone() for name, p in actor.named_parameters()}

    for options in ({}, {"targets": targets}, {"targets": targets}):  # the second call knows what the head does
        for found, expected in zip(measure(shared_prefix_group=members, **options), measure(**options), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)  # softmax and norms stay float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_rewards_and_gradients_are_those_of_separate_rows(family, attention):
    torch.manual_seed(0)
    config = tiny_config(family, initializer_range=0.3, attn_implementation=attention)
    model, (ids, mask) = RewardModel(config=config).eval().double(), batch_of(SOME[2])
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(1)).double()

    def measure(members: int):
        model.zero_grad()
        rewards = model(ids, mask, right_padded=True, shared_prefix_group=members)
        (rewards * weights).sum().backward()
        return rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    for found, expected in zip(measure(2), measure(1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)  # softmax, norms and head stay float32
