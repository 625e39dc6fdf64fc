"""`push_to_hub`: a finished model is on the hub byte for byte, or what went wrong is clear and nothing is lost."""

import sys
from pathlib import Path

import huggingface_hub
import pytest

from coati.config import configure
from coati.errors import RunError, UserError
from coati.tracking import read_run
from coati.trainers import main as entry
from coati.trainers.config import SFTConfig
from coati.trainers.hub import check_hub, push_to_hub
from tests.conftest import settings_for, trainer_classes
from tests.trainers.hub_server import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", found.url)  # what HF_ENDPOINT and HF_HUB_OFFLINE say, read at import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the hub's other protocol for large files
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    found.server.shutdown()
    found.server.server_close()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_command(world, runtime, output, monkeypatch, algorithm="sft", **changes) -> int:
    """The exit status of a training command, in this process and its process group."""
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), steps=1, eval_data=[], **changes)
    ends = []

    def end(status):
        ends.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("coati.parallel.launch", lambda seed: runtime)
    monkeypatch.setattr("coati.parallel.runtime.shutdown", lambda: None)
    monkeypatch.setattr(runtime, "first_to_fail", lambda: True)
    monkeypatch.setattr(entry, "watch_launcher", lambda: None)
    monkeypatch.setattr(entry, "end_process", end)
    with pytest.raises(SystemExit):
        entry.main(config_class, lambda: trainer_class, "test", parse=lambda *_: configure(config_class, **settings))
    return ends[0]


@pytest.mark.parametrize("private", [True, False])
def test_the_finished_model_is_there_byte_for_byte(private, hub, tiny_world, runtime, tmp_path, monkeypatch, capsys):
    changes = dict(push_to_hub="org/tiny.sft-1", hub_private=private)
    assert run_command(tiny_world, runtime, tmp_path, monkeypatch, **changes) == 0
    assert hub.repos == {"org/tiny.sft-1": private}
    files = hub.files["org/tiny.sft-1"]
    assert files == files_in(tmp_path / "model")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert 'from_pretrained("org/tiny.sft-1")' in files["README.md"].decode()
    assert hub.messages == ["coati: step 1"]
    assert f"uploaded: {hub.url}/org/tiny.sft-1/commit/1" in capsys.readouterr().out


def test_of_several_models_the_product_is_uploaded(hub, tiny_world, runtime, tmp_path, monkeypatch):
    changes = dict(algorithm="ppo", push_to_hub="org/policy")
    assert run_command(tiny_world, runtime, tmp_path, monkeypatch, **changes) == 0
    assert hub.files == {"org/policy": files_in(tmp_path / "model")}
    assert 'Critic("FOLDER")' in (tmp_path / "critic" / "README.md").read_text()


@pytest.mark.parametrize("route", ["validate-yaml", "lfs/objects/batch", "commit"])
def test_a_failed_upload_leaves_the_model_and_says_how_to_retry(
    route, hub, tiny_world, runtime, tmp_path, monkeypatch, capsys
):
    hub.refuse[route] = 403
    output = tmp_path / "a run"
    assert run_command(tiny_world, runtime, output, monkeypatch, push_to_hub="org/tiny") == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the model is finished in {output}/model, but its upload failed (")
    assert line.endswith(f"; try again with `hf upload org/tiny '{output}/model' .`")
    assert "the server says no" in line
    assert (output / "model" / "model.safetensors").exists() and read_run(output)["status"] == "finished"
    assert not (output / ".lock").exists() and hub.files == {}
    hub.refuse.clear()
    # the command that is named, and the same run once more
    import huggingface_hub.cli.hf

    words = ["hf", "upload", "org/tiny", f"{output}/model", "."]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        huggingface_hub.cli.hf.main()
    assert not ended.value.code and hub.files["org/tiny"] == files_in(output / "model")
    hub.files.clear()
    assert run_command(tiny_world, runtime, output, monkeypatch, push_to_hub="org/tiny", resume="auto") == 0
    assert hub.files["org/tiny"] == files_in(output / "model")


@pytest.mark.parametrize(
    ("refuse", "repos", "token", "said"),
    [
        ({}, {}, "hf_wrong", "needs a login at .*: run `hf auth login` or set HF_TOKEN"),
        ({"whoami": 500}, {}, TOKEN, "needs a login"),
        ({"repos/create": 403}, {}, TOKEN, "can't be made or written to by me "),
        ({"repos/create": 403, "preupload": 403}, {"org/tiny": True}, TOKEN, "written to by me .*the server says no"),
        ({"api/models": 404}, {}, TOKEN, "can't be made or written to by me"),
        ({}, {"org/tiny": False}, TOKEN, "org/tiny is public: say that it may be .hub_private false., or name another"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_the_first_step(
    refuse, repos, token, said, hub, tiny_world, runtime, tmp_path, monkeypatch, capsys
):
    hub.refuse |= refuse
    hub.repos |= repos
    monkeypatch.setenv("HF_TOKEN", token)
    assert run_command(tiny_world, runtime, tmp_path, monkeypatch, push_to_hub="org/tiny") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: push_to_hub ")]
    assert len(lines) == 1
    with pytest.raises(UserError, match=said):
        check_hub("org/tiny", private=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_nobody_logged_in_and_no_network_are_told(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="run `hf auth login` or set HF_TOKEN"):
        check_hub("org/tiny", private=True)
    hub.server.shutdown()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: TOKEN)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_hub("org/tiny", private=True)
    with pytest.raises(RunError, match="hf upload org/tiny"):
        push_to_hub(Path(__file__).parent, "org/tiny", 3)


def test_a_token_that_may_only_read_is_told(hub):
    hub.role = "read"
    with pytest.raises(UserError, match="the token may only read"):
        check_hub("org/tiny", private=True)
    assert hub.repos == {}


def test_a_repository_that_is_there_is_used_as_it_is(hub):
    hub.repos |= {"org/private": True, "org/public": False}
    check_hub("org/private", private=True)
    check_hub("org/private", private=False)
    check_hub("org/public", private=False)
    assert hub.repos == {"org/private": True, "org/public": False}


@pytest.mark.parametrize("name", ["tiny", "", "a/b/c", "org/", "org/a b", "../x", "org/a--b", "https://hf.co/org/tiny"])
def test_a_name_that_is_none_is_an_error_before_anything_is_loaded(name, tiny_world):
    with pytest.raises(UserError, match=r"push_to_hub is '.*': it takes ORG/NAME"):
        configure(SFTConfig, **settings_for("sft", tiny_world, push_to_hub=name))
