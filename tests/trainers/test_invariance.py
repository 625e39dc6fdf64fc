"""What must not change a trainer's step: padding, the order of rows, micro-batches, buckets, the number of ranks."""

import dataclasses

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.distributed.forks import run_jobs
from tests.distributed.world import make_family
from tests.trainers.steps import BATCH, TRAINERS, Variation, gradient_file, make_trainer, run_step, with_teachers

RTOL = 1e-5
variations = st.builds(
    Variation,
    order=st.permutations(range(BATCH)).map(tuple),
    left=st.sampled_from([0, 1, 5]),
    right=st.sampled_from([0, 1, 5]),
    micro_batch_size=st.integers(1, BATCH),
    max_rows=st.sampled_from([None, 1, 3]),
    bucketed=st.booleans(),
)
some = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # the examples below are simple already, and shrinking takes minutes
)
# what the second process is tried with, beside doing nothing else: nothing is where it was
MIXED = Variation(order=(6, 2, 7, 0, 5, 1, 4, 3), left=3, right=2, micro_batch_size=3, bucketed=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def families(tiny_world, folder):
    taught = {"taught": with_teachers(tiny_world["sft"], folder)}
    return {family: make_family(family, tiny_world, folder) | taught for family in ("gpt2", "llama")}


@pytest.fixture(scope="module", params=sorted(TRAINERS))
def case(request, families, runtime, folder):
    """The name, a trainer, and its step's metrics and gradients as they are."""
    trainer = make_trainer(request.param, families, runtime, folder / "one" / request.param)
    return request.param, trainer, run_step(trainer, Variation())


@pytest.fixture(scope="module")
def two_ranks(families, folder):
    """By trainer: metrics and gradients of two processes in two variations."""
    jobs = [
        {
            "name": name,
            "families": families,
            "folder": str(folder / "two" / name),
            "variations": [dataclasses.asdict(v) for v in (Variation(), MIXED)],
        }
        for name in TRAINERS
    ]
    results = run_jobs(jobs, folder / "jobs", 2)
    return {
        job["name"]: [
            (metrics, load_file(gradient_file(job["folder"], i))) for i, metrics in enumerate(results[job["name"]])
        ]
        for job in jobs
    }


def assert_same(found, expected, rtol=RTOL):
    """Metrics, and gradients relative to the largest entry of each weight's gradient."""
    (metrics, gradients), (expected_metrics, expected_gradients) = found, expected
    assert metrics == pytest.approx(expected_metrics, rel=rtol, abs=rtol)
    assert gradients.keys() == expected_gradients.keys()
    for name, g in expected_gradients.items():
        error, scale = (gradients[name] - g).abs().max(), g.abs().max()
        assert error <= rtol * scale, f"{name}: off by {error / scale:.1e} of its largest entry"


def test_the_step_has_something_to_get_wrong(case):
    """Rows of different lengths, and in PPO: clipped tokens, answers that end and that don't, a KL, weights to move."""
    name, trainer, (metrics, gradients) = case
    assert len({len(trainer.data[i]) for i in trainer.order.batch(0)}) > 2
    assert all(g.abs().max() > 0 for g in gradients.values())
    assert {key.split(".")[0] for key in gradients} == set(trainer.engines)
    if name.startswith("preference"):
        assert abs(metrics["margin"]) > 0.01 and metrics.get("kl", 1.0) > 0.01
    if name.startswith(("ppo", "grpo")):
        shares = ("clip_fraction", "finished") + ("value_clip_fraction",) * name.startswith("ppo")
        assert all(0.02 < metrics[share] < 0.98 for share in shares)
        assert metrics["response_length"] < trainer.config.generation.max_new_tokens
        assert metrics["kl"] > 1e-3 or trainer.reference is None


@some
@given(variation=variations)
@example(variation=Variation(left=5))
@example(variation=Variation(right=5))
@example(variation=Variation(micro_batch_size=1))
@example(variation=Variation(micro_batch_size=3))
@example(variation=Variation(order=MIXED.order, bucketed=False))
def test_a_step_is_the_same_whatever_its_padding_order_and_micro_batches(case, variation):
    """PITFALL 2, PITFALL 9."""
    _, trainer, expected = case
    assert_same(run_step(trainer, variation), expected)


@pytest.mark.slow
@settings(some, max_examples=100)
@given(variation=variations, step=st.integers(0, 3))
def test_any_step_is_the_same_whatever_its_padding_order_and_micro_batches(case, variation, step):
    """PITFALL 2, PITFALL 9. The long form."""
    _, trainer, _ = case
    expected = run_step(trainer, Variation(), step)
    # whitening divides by the advantages' spread: where all rewards are equal it is small, and rounding grows with it
    rtol = RTOL if expected[0].get("reward_std", 1.0) > 0 else 10 * RTOL
    assert_same(run_step(trainer, variation, step), expected, rtol)


@pytest.mark.distributed
@pytest.mark.parametrize("variation", [0, 1], ids=["as it is", "all at once"])
def test_two_ranks_do_the_step_of_one(case, variation, two_ranks):
    """PITFALL 9: global denominators and moments, also with padding, another order and uneven micro-batches."""
    name, _, expected = case
    assert_same(two_ranks[name][variation], expected)
