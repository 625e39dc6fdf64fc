"""Pairs whose common beginning is read once: the log-probs and gradients that the rows have alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.models.pairs import PackedPairs
from tests.models.families import VOCABULARY, padded
from tests.models.test_actor import make

SHAPES = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=4)


def batch_of(shapes: list[tuple[int, int, int]], seed: int = 0):
    """Pairs of one common token and more, and what either adds: `[2 * pairs, seq]`, the first rows of pairs first."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[torch.Tensor]] = [[], []]
    for shared, *rest in shapes:
        beginning = torch.randint(3, VOCABULARY, (shared + 1,), generator=generator)
        for side, more in zip(rows, rest, strict=True):
            side.append(torch.cat([beginning, torch.randint(3, VOCABULARY, (more,), generator=generator)]))
    return padded(rows[0] + rows[1], "right", extra=1)


@given(shapes=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_token_is_there_with_its_position_and_sees_its_own_row(shapes, seed):
    """Beside a loop over all tokens."""
    ids, mask = batch_of(shapes, seed)
    packed = PackedPairs.of(ids, mask)
    lengths, n = mask.sum(1).tolist(), len(shapes)
    assert torch.equal(packed.unpack(packed.input_ids)[mask], ids[mask])
    assert torch.equal(packed.unpack(packed.position_ids)[mask], torch.arange(ids.shape[1]).expand_as(ids)[mask])
    for row, length in enumerate(lengths):
        places = packed.places[row, :length].tolist()
        assert len(set(places)) == length
        for t in range(length):
            seen = packed.visible[row % n, 0, places[t]].nonzero()[:, 0].tolist()
            assert seen == sorted(places[: t + 1])
    for i in range(n):
        first, second = ids[i, : lengths[i]].tolist(), ids[i + n, : lengths[i + n]].tolist()
        common = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        common = min(len(first), len(second)) if common is None else common
        used = {*packed.places[i, : lengths[i]].tolist(), *packed.places[i + n, : lengths[i + n]].tolist()}
        assert len(used) == len(first) + len(second) - common


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
def test_log_probs_and_gradients_are_those_of_separate_rows(family, attention):
    capped = dict(final_logit_softcapping=1.0) if family == "gemma2" else {}
    actor = make(family, initializer_range=0.3, attn_implementation=attention, **capped)
    ids, mask = batch_of([(9, 4, 6), (0, 1, 9), (3, 0, 5), (5, 4, 0)])
    targets = mask & (torch.arange(ids.shape[1]) > 0)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))

    def measure(**options):
        actor.zero_grad()
        log_probs = actor(ids, mask, **options)
        (log_probs * weights)[targets].sum().backward()
        return log_probs.detach()[targets], {name: p.grad.clone() for name, p in actor.named_parameters()}

    for options in ({}, {"targets": targets}, {"targets": targets}):  # the second call knows what the head does
        for found, expected in zip(measure(pairs=True, **options), measure(**options), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
