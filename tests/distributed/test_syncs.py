"""On a shared disk only the machine that wrote a file can sync it: each rank syncs its own files of a checkpoint."""

import atexit
import json
import os
from pathlib import Path

import pytest

from coati.run_layout import MANIFEST, checkpoint_of_step, checkpoints_of, incomplete
from tests.conftest import as_yaml, settings_for
from tests.distributed import forks

pytestmark = pytest.mark.distributed
# what rank 1 writes beside its random states and master weights: of its pipeline stage the optimizer's states
LAYOUTS = {
    "zero2": (dict(plugin="zero2", precision="bf16"), 0),
    "pipeline": (dict(plugin="zero1", precision="bf16", pipeline_parallel=2), 1),
}


def train_and_note_syncs(config: str, folder: Path):
    """One rank; it writes the names of the files that it synced before the checkpoint was listed."""
    from coati.parallel import checkpoint

    synced, fsync, barrier = set(), os.fsync, []

    def note(number):
        if not barrier:
            synced.add(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def listed(*arguments, write_manifest=checkpoint.write_manifest):
        barrier.append(True)
        write_manifest(*arguments)

    def write():
        (folder / f"synced-{os.environ['RANK']}.json").write_text(json.dumps(sorted(synced)))

    os.fsync, checkpoint.write_manifest = note, listed
    atexit.register(write)
    forks.train("sft", config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_syncs_what_it_wrote_before_a_checkpoint_is_listed(layout, tiny_world, tmp_path):
    """PITFALL 26."""
    (settings, shards), output, config = LAYOUTS[layout], tmp_path / "run", tmp_path / "config.yaml"
    changes = dict(output_dir=str(output), steps=1, eval_every=0, batch_size=4, **settings)
    config.write_text(as_yaml(settings_for("sft", tiny_world, **changes)))
    ranks = forks.start(train_and_note_syncs, tmp_path, 2, str(config), tmp_path)
    try:
        assert forks.wait(ranks, 300) == [0, 0], (tmp_path / "log.txt").read_text()[-3000:]
    finally:
        forks.end(ranks)
    checkpoint = checkpoint_of_step(checkpoints_of(output), 1)
    assert incomplete(checkpoint) is None
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} - {MANIFEST}
    synced = {}
    for rank in (0, 1):
        paths = json.loads((tmp_path / f"synced-{rank}.json").read_text())
        inside = [path.partition(f"{checkpoint.name}.partial/")[2] for path in paths]
        synced[rank] = {name.removesuffix(".partial") for name in inside} & files
    of_second = {name for name in files if "1-of-2" in name or "stage-00002-shard" in name}
    assert len([name for name in of_second if "shard" in name]) == shards and len(of_second) == 2 + shards
    assert synced == {0: files - of_second, 1: of_second}
