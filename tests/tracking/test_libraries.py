"""MLflow, Trackio and SwanLab, and what holds for all libraries: what was logged is read back from what they wrote."""

import json
import math
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import pytest
import yaml

from coati.errors import UserError
from coati.tracking import Tracker, TrackingConfig, read_metrics, read_run, read_samples
from coati.tracking.sinks import base, check_installed
from tests.conftest import ROOT

SETTINGS = {"model": {"path": "tiny", "layers": [1, 2]}, "learning_rate": 3e-4, "resume": None}
ROWS = [
    {"prompt": "Where is it?", "response": "# Soon\n* 谢谢", "reward": 1},
    {"prompt": "Hm?", "response": "No.", "reward": -0.5, "note": "short"},
]
TABLE = [[*ROWS[0].values(), None], [*ROWS[1].values()]]
LIBRARIES = list(base.LIBRARIES)


def needs(*names):
    """Skips with a reason where a library is missing."""
    missing = [m for name in names for m in base.LIBRARIES[name].modules if find_spec(m) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: pip install coati[trackers]")


def each_library(function):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in LIBRARIES])(function)


def start(run_dir, resume_step=None, trackers=(), mode="offline", **options):
    config = TrackingConfig(trackers=list(trackers), tracking_mode=mode, **{"run_name": "a run"} | options)
    return Tracker(run_dir, config, algorithm="ppo", settings=SETTINGS, resume_step=resume_step)


@pytest.fixture(autouse=True)
def places(tmp_path_factory, monkeypatch):
    """Nothing of this machine's own: no servers, no logins; Trackio reads its folder once, at import."""
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "SWANLAB_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path_factory.getbasetemp() / "swanlab-root"))
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))


def killed_and_resumed(run_dir, name, **options):
    """A run that was killed after step 5 and goes on from step 3, and fails."""
    first = start(run_dir, trackers=[name], **options)
    for step in range(1, 6):
        first.log({"reward/mean": 70000.0 + step, "kl": 0.25}, step)
    first.log_samples(ROWS, 5, name="eval_samples")
    first.finish("interrupted")
    second = start(run_dir, 3, trackers=[name], **options)
    second.log({"reward/mean": 4.0}, 4)
    second.log({"reward/mean": 6.0}, 6)
    second.finish("failed")


# --- MLflow


def mlflow_client(run_dir):
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{quote(str(run_dir))}/mlflow/mlflow.db")


@needs("mlflow")
def test_mlflow_holds_one_resumed_run_with_settings_curve_samples_and_status(tmp_path):
    """PITFALL 11 and PITFALL 33: 70000 stays 70000, and the samples are there as a table."""
    run_dir = tmp_path / "50%20 done #1? ü"  # what a URL would cut or decode
    run_dir.mkdir()
    killed_and_resumed(run_dir, "mlflow", project="our project")
    client = mlflow_client(run_dir)
    experiment = client.get_experiment_by_name("our project").experiment_id
    [run] = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("a run", "FAILED")
    assert run.data.tags["algorithm"] == "ppo"
    params = {"model.path": "tiny", "model.layers": "[1, 2]", "learning_rate": "0.0003", "resume": "None"}
    assert run.data.params == params
    curve = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/mean")]
    logged = [(step, 70000.0 + step) for step in range(1, 6)] + [(4, 4.0), (6, 6.0)]
    assert sorted(curve) == sorted(logged)
    assert len(client.get_metric_history(run.info.run_id, "kl")) == 5
    [table] = (run_dir / "mlflow" / "artifacts").rglob("eval_samples/00000005.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "response", "reward", "note"], "data": TABLE}
    [settings] = (run_dir / "mlflow" / "artifacts").rglob("settings.json")
    assert json.loads(settings.read_text()) == SETTINGS


@needs("mlflow")
def test_mlflow_takes_all_settings_names_and_numbers(tmp_path):
    """It takes no brackets in names, and no parameter a second time with another value."""
    tracker = start(tmp_path, trackers=["mlflow"])
    tracker._sinks["mlflow"].finish("finished")
    many = {f"setting {i} [x]": i for i in range(230)}
    config = TrackingConfig(trackers=["mlflow"], tracking_mode="offline", project="many")
    for resume_step in (None, 1):
        tracker = Tracker(tmp_path, config, algorithm="sft", settings=many, resume_step=resume_step)
        tracker.log({"acc@1 (é)": 1.0, "nan": math.nan}, 1)
        tracker.finish("finished")
        many["setting 7 [x]"] = "changed"
    client = mlflow_client(tmp_path)
    [run] = client.search_runs([client.get_experiment_by_name("many").experiment_id])
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 230 and run.data.params["setting 229 _x_"] == "229"
    assert run.data.metrics["acc_1 _é_"] == 1.0 and math.isnan(run.data.metrics["nan"])


# --- Trackio


def trackio_storage():
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage


@needs("trackio")
def test_trackio_holds_one_resumed_run_with_settings_curve_samples_and_status(tmp_path):
    """PITFALL 11 and PITFALL 33: as above."""
    killed_and_resumed(tmp_path / "a", "trackio", project="coati-resumed")
    start(tmp_path / "b", trackers=["trackio"], project="coati-resumed").finish("finished")  # of the same name
    storage, run_id = trackio_storage(), read_run(tmp_path / "a")["run_id"]
    name = f"a run-{run_id}"
    assert name in storage.get_runs("coati-resumed")
    logs = storage.get_logs("coati-resumed", name)
    curve = [(row["step"], row["reward/mean"]) for row in logs if "reward/mean" in row]
    assert curve == [(step, 70000.0 + step) for step in range(1, 6)] + [(4, 4.0), (6, 6.0)]
    [samples] = [row for row in logs if "eval_samples" in row]
    assert samples["step"] == 5
    assert [list(row.values()) for row in samples["eval_samples"]["_value"]] == TABLE
    config = storage.get_run_config("coati-resumed", name)
    assert {key: config[key] for key in SETTINGS} == SETTINGS and config["algorithm"] == "ppo"
    alerts = [(a["title"], a["level"]) for a in storage.get_alerts("coati-resumed") if a["run"] == name]
    assert sorted(alerts) == [("run failed", "error"), ("run interrupted", "warn")]


@needs("trackio")
@pytest.mark.parametrize("name", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_offline_goes_to_no_server_that_the_environment_names(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:1/")
    with pytest.raises(UserError, match=f"{name} is set: unset it"):
        start(tmp_path, trackers=["trackio"])


# --- SwanLab


def swanlab_records(run_dir):
    """All records of all sessions, in order, as `(kind, record)`."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = []
    for path in sorted((run_dir / "swanlab").glob("run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        for data in reader:
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            found.append((kind, getattr(record, kind)))
        reader.close()
    return found


@needs("swanlab")
def test_swanlab_holds_settings_curve_samples_and_status_under_one_id(tmp_path):
    """PITFALL 11 and PITFALL 33: as above."""
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState

    killed_and_resumed(tmp_path, "swanlab", project="our-project")
    records = swanlab_records(tmp_path)
    starts = [record for kind, record in records if kind == "start"]
    assert [(r.project, r.name, r.job_type, r.id) for r in starts] == [
        ("our-project", "a run", "ppo", read_run(tmp_path)["run_id"])
    ] * 2
    scalars = [record for kind, record in records if kind == "scalar"]
    curve = [(record.step, record.value.number) for record in scalars if record.key == "reward/mean"]
    assert curve == [(step, 70000.0 + step) for step in range(1, 6)] + [(4, 4.0), (6, 6.0)]
    [media] = [record for kind, record in records if kind == "media"]
    assert (media.key, media.step) == ("eval_samples", 5)
    texts = [next((tmp_path / "swanlab").rglob(item.filename)).read_text() for item in media.value.items]
    assert texts == [
        "prompt: Where is it?\nresponse: # Soon\n* 谢谢\nreward: 1",
        "prompt: Hm?\nresponse: No.\nreward: -0.5\nnote: short",
    ]
    [config, _] = (tmp_path / "swanlab").rglob("config.yaml")
    assert {key: entry["value"] for key, entry in yaml.safe_load(config.read_text()).items()} == SETTINGS | {
        "resume": {}
    }
    ends = [RunState.Name(record.state) for kind, record in records if kind == "finish"]
    assert ends == ["RUN_STATE_ABORTED", "RUN_STATE_CRASHED"]


# --- all of them


@each_library
def test_a_library_says_nothing_on_the_terminal_and_leaves_signals_alone(tmp_path, capfd, monkeypatch, name):
    """A run saves when it is asked to stop: no library may end the process on Ctrl-C instead."""
    monkeypatch.setitem(sys.modules, "openai", sys.modules.get("openai", ModuleType("openai")))  # W&B would advertise

    def ours(number, frame):
        raise AssertionError("nobody sent a signal")

    before = {number: signal.signal(number, ours) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for status in ("finished", "interrupted"):  # one run after the other, as the stages of a pre-training are
            tracker = start(tmp_path, trackers=[name])
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is ours
            tracker.log({"loss": 1.0}, 1)
            tracker.log_samples(ROWS, 1)
            tracker.finish(status)
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is ours
            assert list(tracker._sinks) == [name]  # it has not failed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in ("mlflow", "trackio", "swanlab", "wandb")]
)
def test_online_without_a_login_is_one_clear_error(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name} could not start .*tracking_mode to offline") as error:
        start(tmp_path / "run", trackers=[name], mode="online")
    assert "\n" not in str(error.value)
    assert read_run(tmp_path / "run")["status"] == "failed"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}  # nothing is written elsewhere


class Deaf:
    """A tracker that fails from its second call on."""

    def __init__(self, run):
        self.calls = []

    def log(self, metrics, step):
        self.calls.append(("log", step))
        if step > 1:
            raise ConnectionError("the server\nis gone")

    def log_samples(self, rows, step, name):
        self.calls.append(("log_samples", step))

    def finish(self, status):
        self.calls.append(("finish", status))
        raise RuntimeError


@pytest.fixture
def deaf(monkeypatch):
    """Two libraries of which the second one is `Deaf`."""
    module = type(sys)("deaf_library")
    module.Deaf = Deaf
    monkeypatch.setitem(sys.modules, "deaf_library", module)
    monkeypatch.setitem(base.LIBRARIES, "wandb", base.Library("deaf_library:Deaf", ("json",), ""))


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, deaf, capsys):
    tracker = start(tmp_path, trackers=["tensorboard", "wandb"])
    sink = tracker._sinks["wandb"]
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
        tracker.log_samples(ROWS, step)
    tracker.finish("finished")
    assert sink.calls == [("log", 1), ("log_samples", 1), ("log", 2)]
    said = capsys.readouterr().err
    assert said == "wandb failed (the server is gone): it is left out from here, metrics.jsonl has all\n"
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3] and len(read_samples(tmp_path)) == 6
    assert read_run(tmp_path)["status"] == "finished"


def test_a_tracker_that_fails_at_the_end_changes_nothing(tmp_path, deaf, capsys):
    tracker = start(tmp_path, trackers=["wandb", "tensorboard"])
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("finished")
    assert capsys.readouterr().err.startswith("wandb failed (RuntimeError)")
    assert read_run(tmp_path)["status"] == "finished"


def test_what_started_before_one_that_can_not_start_is_told(tmp_path, deaf, monkeypatch):
    """Or its server would show a run that never ends."""
    told = []
    monkeypatch.setattr(Deaf, "finish", lambda self, status: told.append(status))
    monkeypatch.setitem(base.LIBRARIES, "trackio", base.Library("deaf_library:Absent", ("json",), ""))
    with pytest.raises(UserError, match="trackio could not start"):
        start(tmp_path, trackers=["wandb", "trackio"])
    assert told == ["failed"] and read_run(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("missing", [["mlflow"], ["trackio", "swanlab"], ["wandb", "tensorboard", "mlflow"]])
def test_missing_libraries_are_named_in_one_line_before_anything_is_loaded(tmp_path, missing):
    """A run of a real command, in which the libraries can't be found."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(sys.argv.pop(1).split(','))\n"
        "from coati.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    modules = ",".join(missing)
    words = ["sft", "--trackers", *missing, "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, "-c", code, modules, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = " ".join(missing)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == f"error: trackers: {names} can't be imported; `pip install {names}`, or leave out of trackers.\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_installed_is_not_imported_to_know_it():
    code = "import sys; from coati.tracking import check_installed; check_installed(['wandb', 'tensorboard'])\n"
    code += "print({'wandb', 'tensorboard', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    check_installed([])


def test_a_tracker_named_twice_is_an_error():
    with pytest.raises(UserError, match="mlflow, wandb twice"):
        TrackingConfig(trackers=["wandb", "mlflow", "wandb", "mlflow", "trackio"])


def test_the_choices_of_the_setting_are_the_libraries_there_are():
    from typing import get_args

    from coati.tracking.config import TrackerName

    assert list(get_args(TrackerName)) == LIBRARIES
    for library in base.LIBRARIES.values():
        module, _, _ = library.sink.partition(":")
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()
