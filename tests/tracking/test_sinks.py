"""Weights & Biases and TensorBoard: what was logged is read back from their own files."""

import json
import struct
import zlib

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from coati.errors import UserError
from coati.tracking import Tracker, TrackingConfig, read_run

SETTINGS = {"model": {"path": "tiny"}, "learning_rate": 3e-4}
ROWS = [
    {"prompt": "Where is it?", "response": "Soon.", "reward": 1},
    {"prompt": "Hm?", "response": "No.", "reward": -0.5, "note": "short"},
]


def start(run_dir, resume_step=None, **options):
    config = TrackingConfig(run_name="a run", **options)
    return Tracker(run_dir, config, algorithm="ppo", settings=SETTINGS, resume_step=resume_step)


def wandb_records(path):
    """The records of a `.wandb` file: LevelDB's log format around W&B's own protocol buffers.

    wandb 0.31 ships no Python reader any more (the one that it has is inside the wandb-core binary).
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, message, records = 7, b"", []
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        position += 7 + length
        message += part
        if kind in (1, 4):  # whole, or last part
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def history(records):
    """One dict a step; the keys of nested items are joined by dots."""
    steps = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            steps.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return steps


def wandb_runs(run_dir):
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """A run with W&B (offline) and TensorBoard which was killed after step 5 and resumed at step 3."""
    run_dir = tmp_path_factory.mktemp("run")
    options = {"trackers": ["wandb", "tensorboard"], "tracking_mode": "offline"}
    first = start(run_dir, **options)
    for step in range(1, 6):
        first.log({"reward/mean": 70000.0 + step, "kl": 0.25}, step)
    first.log_samples(ROWS, 5, name="eval_samples")
    first.finish("interrupted")
    second = start(run_dir, resume_step=3, **options)
    for step in range(4, 7):
        second.log({"reward/mean": float(step)}, step)
    second.finish("finished")
    return run_dir


def test_wandb_offline_holds_settings_curve_and_table(resumed_run):
    """PITFALL 11 and PITFALL 33: 70000 stays 70000 in W&B, and the samples are there as a table."""
    path = next(path for path in wandb_runs(resumed_run) if len(history(wandb_records(path))) == 5)
    records = wandb_records(path)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert (run.project, run.display_name, run.job_type) == ("coati", "a run", "ppo")
    curve = {step["_step"]: step["reward/mean"] for step in history(records)}
    assert curve == {step: 70000.0 + step for step in range(1, 6)}
    last = history(records)[-1]
    assert last["eval_samples._type"] == "table-file"
    table = json.loads((path.parent / "files" / last["eval_samples.path"]).read_text())
    assert table["columns"] == ["prompt", "response", "reward", "note"]
    assert table["data"] == [["Where is it?", "Soon.", 1, None], ["Hm?", "No.", -0.5, "short"]]


def test_wandb_goes_on_under_the_same_id(resumed_run):
    run_id = read_run(resumed_run)["run_id"]
    assert [path.name for path in wandb_runs(resumed_run)] == [f"run-{run_id}.wandb"] * 2


def test_wandb_ids_of_two_runs_differ(tmp_path):
    start(tmp_path / "a")
    start(tmp_path / "b")
    assert read_run(tmp_path / "a")["run_id"] != read_run(tmp_path / "b")["run_id"]


def test_tensorboard_holds_the_resumed_curve_once(resumed_run):
    """PITFALL 11: 70000 stays 70000; of the killed session only the steps up to the resumed one remain."""
    events = EventAccumulator(str(resumed_run / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert curve == [(1, 70001.0), (2, 70002.0), (3, 70003.0), (4, 4.0), (5, 5.0), (6, 6.0)]
    assert [event.step for event in events.Scalars("kl")] == [1, 2, 3]


def test_tensorboard_shows_samples_as_text(tmp_path):
    """PITFALL 33: the responses are in TensorBoard's text tab, where Markdown in them stays text."""
    tracker = start(tmp_path, trackers=["tensorboard"])
    tracker.log_samples([{"prompt": "p", "response": "# not a title\n* no list", "reward": 1.0}], 2)
    tracker.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 2
    assert text == "    prompt: p\n    response: # not a title\n    * no list\n    reward: 1.0"


def test_wandb_says_nothing_on_the_terminal(tmp_path, capfd):
    tracker = start(tmp_path, trackers=["wandb"], tracking_mode="offline")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("finished")
    assert capfd.readouterr() == ("", "")


def test_wandb_online_without_a_login_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match="wandb login"):
        start(tmp_path / "run", trackers=["wandb"])


def test_logging_leaves_the_random_state_alone(tmp_path):
    """A run that is logged trains as one that is not: tracking draws no number from torch's generator."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tracker = start(tmp_path, trackers=["tensorboard", "wandb"], tracking_mode="offline")
    tracker.log({"loss": 1.0}, 1)
    tracker.log_samples(ROWS, 1)
    tracker.finish("finished")
    assert torch.equal(torch.get_rng_state(), before)
