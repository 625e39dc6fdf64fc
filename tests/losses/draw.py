"""What hypothesis draws for the losses, and how a tensor is compared with an oracle's floats."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
dtypes = st.sampled_from([torch.float64, torch.float32])
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5}
SPECIALS = [0.0, 1e-12, -1e-6, 1.0]


@st.composite
def masks(draw, min_seq=1):
    """Bool `[batch, seq]`; holes and rows without any True entry included."""
    batch, seq = draw(st.integers(1, 4)), draw(st.integers(min_seq, 7))
    row = st.one_of(st.just([False] * seq), st.just([True] * seq), st.lists(st.booleans(), min_size=seq, max_size=seq))
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@st.composite
def numbers(draw, shape, limit, dtype):
    """A tensor of one scale between 1e-6 and 1 of `limit`, the limits themselves and special values strewn in."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale = limit * draw(st.sampled_from([1.0, 0.1, 1e-2, 1e-6]))
    x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale
    extremes = torch.tensor([limit, -limit, *SPECIALS], dtype=torch.float64)
    chosen = extremes[torch.randint(len(extremes), shape, generator=generator)]
    strewn = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return torch.where(strewn, chosen, x).to(dtype)


def poison(x, mask):
    """`x` with NaN and both infinities in its masked entries."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype)
    return torch.where(mask, x, bad[torch.arange(x.numel()).reshape(x.shape) % 3])


def assert_close(actual, expected, scale=0.0, rtol=None):
    """Equal to `rtol` of the value, or of `scale`: the size of the terms that were added up to it."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    rtol = RTOL[actual.dtype] if rtol is None else rtol
    assert actual.isfinite().all(), f"not finite: {actual}"
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=rtol * scale + 1e-300)


def assert_metrics(actual, expected, scale, rtol=None):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(torch.as_tensor(actual[name]), value, scale, rtol)
        assert not actual[name].requires_grad
