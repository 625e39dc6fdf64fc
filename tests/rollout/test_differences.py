"""Weights that travel as differences are, bit for bit, those of whole files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from coati.models import Actor, LoraSettings
from coati.rollout.remote import DifferenceWriter, WeightVersions, load_weights
from coati.rollout.remote.differences import (
    apply_differences,
    base_of,
    bytes_of,
    chain_of,
    checksum_of,
    differences_of,
    gaps_of,
    positions_of,
)
from coati.rollout.remote.weights import weights_of

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float16: torch.int16, torch.int64: torch.int64}


def same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    assert expected.dtype == found.dtype and expected.shape == found.shape
    return torch.equal(expected.view(BITS[expected.dtype]), found.view(BITS[found.dtype]))


@given(st.sets(st.integers(0, 5000), max_size=40))
def test_positions_come_back_from_their_gaps(positions):
    positions = np.array(sorted(positions), np.int64)
    assert positions_of(gaps_of(positions)).tolist() == positions.tolist()


@pytest.mark.parametrize("skipped", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_positions_far_apart_come_back_from_their_gaps(skipped):
    positions = np.array([skipped, 2 * skipped + 1, 2 * skipped + 2])
    assert positions_of(gaps_of(positions)).tolist() == positions.tolist()


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
def test_differences_make_the_new_weights_of_the_old_bit_for_bit(dtype, share):
    """Any bits: NaN of every kind, infinities, both zeros, subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    bits = BITS[dtype]

    def drawn(*shape):
        info = torch.iinfo(bits)
        return torch.randint(info.min, info.max, shape, generator=generator, dtype=bits).view(dtype)

    old = {"matrix": drawn(50, 70), "vector": drawn(1000), "scalar": drawn(), "empty": drawn(0, 3)}
    new = {}
    for name, tensor in old.items():
        changes = torch.rand(tensor.shape, generator=generator) < share
        new[name] = torch.where(changes, drawn(*tensor.shape).view(bits), tensor.view(bits)).view(dtype)
    found = {name: tensor.clone() for name, tensor in old.items()}
    differences = differences_of(old, new)
    apply_differences(found, differences)
    assert all(same_bits(new[name], found[name]) for name in new)
    assert bytes_of(differences) <= bytes_of(new)
    if share == 0:
        assert differences == {}


def test_zeros_of_another_sign_differ_and_a_nan_is_itself():
    old = {"x": torch.tensor([0.0, float("nan"), 1.0, 2.0])}
    new = {"x": torch.tensor([-0.0, float("nan"), 1.0, 2.0])}
    assert sorted(differences_of(old, new)) == ["x/gaps", "x/values"]
    assert differences_of(new, new) == {}


@pytest.mark.parametrize(("step", "stored"), [(50, ["x/gaps", "x/values"]), (2, ["x/gaps", "x/values"]), (1, ["x"])])
def test_a_tensor_that_mostly_changed_is_stored_whole(step, stored):
    """A number that changed takes a byte more than another one: in bf16 three bytes instead of two."""
    old = {"x": torch.zeros(3000, dtype=torch.bfloat16)}
    new = {"x": old["x"].clone()}
    new["x"][::step] = 1
    differences = differences_of(old, new)
    assert sorted(differences) == stored
    assert bytes_of(differences) == (6000 if step == 1 else 3 * 3000 // step)


# --- files


@pytest.fixture
def policy(tiny_world) -> Actor:
    return Actor(tiny_world["policy"], dtype=torch.bfloat16).eval()


def copy_of(policy: Actor, tiny_world) -> Actor:
    other = Actor(tiny_world["policy"], dtype=torch.bfloat16).eval()
    other.load_state_dict(policy.state_dict())
    return other


@torch.no_grad()
def change(policy: Actor, share: float, seed: int):
    """Moves a share of all numbers to the next greater one in size."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.view(torch.int16).add_((torch.rand(parameter.shape, generator=generator) < share).to(torch.int16))


def versions_of(policy: Actor, runtime, folder: Path, staleness: int, writes_differences: bool = True):
    differences = DifferenceWriter() if writes_differences else None
    return WeightVersions(folder, policy.state_dict, policy, torch.bfloat16, runtime, staleness, differences)


def test_whatever_versions_a_generator_had_its_log_probs_are_those_of_whole_files(
    policy, tiny_world, runtime, tmp_path
):
    """One that loads each version, ones that skip some, one that starts anew: equal to the bit, as the weights are."""
    whole = versions_of(policy, runtime, tmp_path / "whole", 9, writes_differences=False)
    versions = versions_of(policy, runtime, tmp_path / "differences", 9)
    for k in range(10):
        assert whole.publish(k) >= versions.publish(k) > 0
        change(policy, 0.1, seed=k)
    files = [base_of(versions.path(k)) for k in range(10)]
    assert files[0] is None and None in files[1:] and sum(file is not None for file in files) > 5
    assert versions.checksums == whole.checksums
    ids = torch.arange(1, 21).view(1, -1)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 4, 5, 9], [9], [3, 2, 8, 0, 9]):
        found, loaded = copy_of(policy, tiny_world), ""
        for k in order:
            load_weights(found, versions.path(k), versions.checksums[k], loaded)
            loaded = versions.checksums[k]
            expected = copy_of(policy, tiny_world)
            load_weights(expected, whole.path(k), whole.checksums[k])
            theirs, mine = expected.state_dict(), found.state_dict()
            assert all(same_bits(theirs[name], mine[name]) for name in theirs)
        with torch.no_grad():
            log_probs = [model(ids) for model in (expected, found)]
        assert log_probs[0].shape == ids.shape and torch.equal(*log_probs)


def test_a_generator_that_has_a_version_reads_the_differences_since(policy, tiny_world, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path, 9)
    for k in range(4):
        versions.publish(k)
        change(policy, 0.02, seed=k)
    found, checksums = copy_of(policy, tiny_world), versions.checksums
    load_weights(found, versions.path(1), checksums[1])
    for k in (0, 1):
        versions.path(k).unlink()
    load_weights(found, versions.path(3), checksums[3], loaded=checksums[1])
    assert checksum_of(weights_of(found, found.state_dict(), torch.bfloat16)) == checksums[3]
    with pytest.raises(FileNotFoundError):
        load_weights(found, versions.path(3), checksums[3])


def test_differences_of_adapters_are_those_of_what_trains(tiny_world, runtime, tmp_path):
    theirs, mine = (Actor(tiny_world["policy"], lora=LoraSettings(2), dtype=torch.bfloat16) for _ in range(2))
    versions = versions_of(theirs, runtime, tmp_path, 1)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    for k in range(2):
        with torch.no_grad():
            trained[0][0] += 1
        versions.publish(k)
    assert [name for name in load_file(versions.path(1)) if "lora_" not in name] == []
    assert base_of(versions.path(1)) is not None
    load_weights(mine, versions.path(1), versions.checksums[1])
    assert checksum_of(weights_of(mine, mine.state_dict(), torch.bfloat16)) == versions.checksums[1]


def test_a_version_is_put_together_from_at_most_twice_its_bytes(policy, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path, 40)
    for k in range(30):
        versions.publish(k)
        change(policy, 0.02, seed=k)
    chains = [chain_of(versions.path(k)) for k in range(30)]
    whole = bytes_of(load_file(versions.path(0)))
    sizes = [sum(bytes_of(load_file(path)) for path in chain) for chain in chains]
    assert max(len(chain) for chain in chains) > 10
    assert whole < max(sizes) < 2 * whole


def test_versions_stay_with_the_files_that_they_are_put_together_from(policy, tiny_world, runtime, tmp_path):
    """In a checkpoint they are whole, and so is the first one of a run that goes on from it."""
    versions = versions_of(policy, runtime, tmp_path / "weights", staleness=1)
    for k in range(5):
        versions.publish(k)
        change(policy, 0.02, seed=k)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        f"version-{k:08d}.safetensors" for k in range(5)
    ]
    (tmp_path / "checkpoint").mkdir()
    versions.save(tmp_path / "checkpoint" / "weights", 5)
    versions.publish(5)
    checksums = dict(versions.checksums)
    resumed = versions_of(policy, runtime, tmp_path / "weights", staleness=1)
    resumed.load(tmp_path / "checkpoint" / "weights", 5)
    assert resumed.checksums == {4: checksums[4]}
    resumed.publish(5)
    assert resumed.checksums == checksums and base_of(resumed.path(5)) is None
    for k in (4, 5):
        load_weights(copy_of(policy, tiny_world), resumed.path(k), checksums[k])
    change(policy, 0.02, seed=9)
    resumed.publish(6)
    assert [base_of(path) is None for path in sorted((tmp_path / "weights").iterdir())] == [True, False]


def test_weights_that_did_not_change_are_a_file_without_numbers(policy, tiny_world, runtime, tmp_path):
    """As after an iteration whose optimizer steps were skipped."""
    versions = versions_of(policy, runtime, tmp_path, 1)
    sizes = [versions.publish(k) for k in range(2)]
    assert sizes[1] < 1000 and load_file(versions.path(1)) == {}
    load_weights(copy_of(policy, tiny_world), versions.path(1), versions.checksums[1])


@pytest.mark.parametrize("damage", ["newest", "middle", "whole", "cut", "of another run", "written again", "gone"])
def test_differences_are_added_to_nothing_if_a_file_is_not_what_it_was(damage, policy, tiny_world, runtime, tmp_path):
    runs = []
    for seeds in ((0, 1, 2), (3, 4, 5), (0, 1, 6)):
        start = copy_of(policy, tiny_world)
        runs.append(versions_of(start, runtime, tmp_path / f"run {len(runs)}", 5))
        for k, seed in enumerate(seeds):
            change(start, 0.02, seed)
            runs[-1].publish(k)
    run, other, later = runs
    files = [run.path(k) for k in range(3)]
    assert [base_of(path) is None for path in files] == [True, False, False]
    broken = files[{"newest": 2, "written again": 2, "whole": 0}.get(damage, 1)]
    match damage:
        case "cut":
            broken.write_bytes(broken.read_bytes()[:-9])
        case "of another run":
            shutil.copyfile(other.path(1), broken)
        case "written again":
            shutil.copyfile(later.path(2), broken)
        case "gone":
            broken.unlink()
        case _:
            content = broken.read_bytes()
            broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = checksum_of(policy.state_dict())
    with pytest.raises(FileNotFoundError if damage == "gone" else RuntimeError, match="version-"):
        load_weights(policy, files[2], run.checksums[2])
    assert checksum_of(policy.state_dict()) == before
