"""Training on what a generator samples, here in a thread of this process: see tests/distributed for real ones."""

import copy
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from coati.config import configure
from coati.errors import UserError
from coati.rollout.remote import Generators, Service, load_weights
from coati.rollout.remote.address import Address
from coati.rollout.remote.differences import base_of
from coati.rollout.remote.server import serve_in_thread
from coati.run_layout import JOURNAL
from coati.tracking import read_metrics
from coati.tracking.report import write_report
from coati.trainers.generator import check_generators, sampler_and_weights
from coati.trainers.sft import SFTConfig
from coati.variables import GENERATORS, GENERATORS_FOLDER
from tests.conftest import ROOT, functions, settings_for, trainer_classes

TALK = dict(environment=f"{ROOT / 'tests' / 'talk.py'}:Talk", max_turns=3, max_tokens=120, stop=["e", "o"], rewards=[])


@contextmanager
def generator(config, runtime, folder: Path, monkeypatch):
    """A generator with a run's settings, which trainers find."""
    folder.mkdir(exist_ok=True)
    service = Service(*sampler_and_weights(config, runtime))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    port = serve_in_thread(service, "127.0.0.1", "secret")
    Generators(folder, 1).announce(0, Address(f"http://127.0.0.1:{port}", "secret"))
    with monkeypatch.context() as patched:
        patched.setenv(GENERATORS, "1")
        patched.setenv(GENERATORS_FOLDER, str(folder))
        yield service
    service.stop()
    thread.join()


def train(algorithm: str, world, runtime, output: Path, monkeypatch=None, **changes):
    """A trainer after its last step; with a generator if there is a monkeypatch."""
    config_class, trainer_class = trainer_classes(algorithm)
    changes = dict(temperature=1.0, steps=3, save_every=0, eval_every=0) | changes
    config = configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes))
    if monkeypatch is None:
        trainer = trainer_class(config, runtime)
        trainer.train()
        return trainer
    with generator(config, runtime, output.with_name("addresses"), monkeypatch):
        trainer = trainer_class(config, runtime)
        trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in next(iter(trainer.engines.values())).module.state_dict().items()}


def assert_equal(expected, found):
    expected, found = weights(expected), weights(found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


REFILLED = dict(dynamic_sampling=True, group_size=2, steps=2)
CASES = {
    "lora": ("grpo", dict(lora_rank=2)),
    "episodes": ("grpo", TALK),
    "dynamic sampling": ("grpo", REFILLED),
    "score centering": ("grpo", dict(score_centering=8, policy_loss="cispo")),
    "remax": ("grpo", dict(advantage="remax", steps=2)),
    "shared trunk": ("ppo", dict(shared_trunk=True, steps=2)),
    "distillation": ("distill", dict(steps=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_without_staleness_every_method_takes_the_steps_of_the_synchronous_run(
    case, tiny_world, runtime, tmp_path, monkeypatch
):
    algorithm, changes = CASES[case]
    if case == "dynamic sampling":
        changes = changes | dict(rewards=functions(f"{tiny_world['rewards']}:odd"))
    expected = train(algorithm, tiny_world, runtime, tmp_path / "synchronous", **changes)
    found = train(algorithm, tiny_world, runtime, tmp_path / "asynchronous", monkeypatch, **changes)
    assert_equal(expected, found)
    jobs = len(list((tmp_path / "asynchronous" / JOURNAL).glob("*/*.jsonl")))
    refills = sum(row.get("refills", 0) for row in read_metrics(tmp_path / "asynchronous"))
    assert jobs == found.total_steps + refills
    if case == "dynamic sampling":
        assert refills > 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_iteration_is_sampled_with_the_weights_of_so_many_iterations_ago(
    algorithm, tiny_world, runtime, tmp_path, monkeypatch
):
    """Log-probs noted at sampling are those of the old weights; training notices how far it has come from them."""
    trainer = train(algorithm, tiny_world, runtime, tmp_path / "run", monkeypatch, steps=4, max_staleness=2)
    rows = [row for row in read_metrics(tmp_path / "run") if "staleness" in row]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 2]
    far = [row["rollout_kl"] for row in rows]
    assert far[0] < 1e-9 and min(far[1:]) > 1e-6
    if algorithm == "grpo":  # corrected unless the settings say otherwise
        assert rows[0]["mismatch/k3"] < 1e-9 < rows[2]["mismatch/k3"]
    folders = sorted(path.name for path in (tmp_path / "run" / JOURNAL).iterdir())
    assert folders == ["version-00000000", "version-00000001"]
    report = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert ">generator 0</text>" in report and "<title>iteration 4: learn" in report
    assert sorted(trainer.versions.checksums) == [1, 2, 3]


def test_journals_of_old_weights_go_if_the_settings_say_so(tiny_world, runtime, tmp_path, monkeypatch):
    changes = dict(steps=6, max_staleness=1, keep_journal=False, save_every=1)
    train("grpo", tiny_world, runtime, tmp_path / "run", monkeypatch, **changes)
    versions = sorted(path.name for path in (tmp_path / "run" / JOURNAL).iterdir())
    assert versions == ["version-00000004"]


def test_a_run_that_goes_on_samples_nothing_that_is_in_its_journal(tiny_world, runtime, tmp_path, monkeypatch):
    changes = dict(steps=4, max_staleness=1, save_every=2)
    expected = train("grpo", tiny_world, runtime, tmp_path / "whole", monkeypatch, **changes)
    first = train("grpo", tiny_world, runtime, tmp_path / "run", monkeypatch, **changes)
    journal = list((tmp_path / "run" / JOURNAL).glob("*/*.jsonl"))
    written = {path: path.stat().st_mtime_ns for path in journal}
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert [path.name for path in (checkpoint / "weights").iterdir()] == ["version-00000001.safetensors"]
    again = train("grpo", tiny_world, runtime, tmp_path / "run", monkeypatch, resume=str(checkpoint), **changes)
    assert_equal(expected, first)
    assert_equal(expected, again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / JOURNAL).glob("*/*.jsonl")} == written


def test_differences_take_the_steps_of_whole_weights(tiny_world, runtime, tmp_path, monkeypatch):
    """Also after a resume in either format. Checkpoints have the same whole files; jobs have the same names, so none is
    done again."""
    changes = dict(steps=6, max_staleness=2, save_every=3, precision="bf16", learning_rate=1e-6)
    run, weights_folder = tmp_path / "run", tmp_path / "whole" / "weights"
    expected = train("grpo", tiny_world, runtime, tmp_path / "whole", monkeypatch, **changes)
    changes |= dict(weights_format="differences")
    found = train("grpo", tiny_world, runtime, run, monkeypatch, **changes)
    assert_equal(expected, found)
    checksums = found.versions.checksums
    assert expected.versions.checksums == checksums and len(set(checksums.values())) == 3
    whole = [row["bytes/publish"] for row in read_metrics(tmp_path / "whole") if "bytes/publish" in row]
    sizes = [row["bytes/publish"] for row in read_metrics(run) if "bytes/publish" in row]
    assert whole == [weights_folder.joinpath("version-00000005.safetensors").stat().st_size] * 6
    assert sizes[0] == whole[0] and max(sizes[1:]) < 0.5 * whole[0]
    checkpoint = run / "checkpoints" / "step-00000003"
    assert [base_of(path) is None for path in sorted((run / "weights").iterdir())] == [True] + [False] * 5
    files = [tmp_path / name / "checkpoints" / "step-00000003" / "weights" for name in ("whole", "run")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in files]
    assert contents[0] == contents[1] and len(contents[0]) == 2
    journal = {path.name for path in (tmp_path / "whole" / JOURNAL).glob("*/*.jsonl")}
    assert {path.name for path in (run / JOURNAL).glob("*/*.jsonl")} == journal
    for weights_format in ("differences", "whole"):
        for path in (run / JOURNAL).glob("version-0000000[123]/*.jsonl"):
            path.unlink()
        changes |= dict(weights_format=weights_format, resume=str(checkpoint))
        again = train("grpo", tiny_world, runtime, run, monkeypatch, **changes)
        assert_equal(expected, again)
        assert {path.name for path in (run / JOURNAL).glob("*/*.jsonl")} == journal


PARTIAL = dict(partial_rollouts=True, max_staleness=3)  # of 8 tokens: up to 3, 6 and 8
VERSIONS = [[0], [0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]  # of the parts of a long response of iteration k


def journal_of(run: Path) -> dict[tuple[int, ...], dict[int, dict]]:
    """What a journal has of each response: by its seed, and by the version that has drawn it."""
    found: dict[tuple[int, ...], dict[int, dict]] = {}
    for path in sorted((run / JOURNAL).glob("*/*.jsonl")):
        _, *rows, _ = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            found.setdefault(tuple(row["seed"]), {})[row["weights_version"]] = row
    return found


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_parts_of_responses_are_of_the_versions_that_the_schedule_says(
    algorithm, tiny_world, runtime, tmp_path, monkeypatch
):
    """And each has the log-probs of its version's weights, up to where the response ended."""
    states = {}

    def noting(policy, path, checksum, loaded=""):
        load_weights(policy, path, checksum, loaded)
        states[int(path.stem.removeprefix("version-"))] = copy.deepcopy(policy)

    monkeypatch.setattr("coati.trainers.generator.load_weights", noting)
    changes = dict(steps=6, temperature=0.7, stop=["e"], **PARTIAL)
    train(algorithm, tiny_world, runtime, tmp_path / "run", monkeypatch, **changes)
    seen, tokens = set(), {k: {} for k in range(6)}
    for (_, k, *_), parts in journal_of(tmp_path / "run").items():
        by_version = {v: VERSIONS[k].count(v) for v in VERSIONS[k]} if k > 1 else {0: 3}
        ends = np.cumsum(list(by_version.values()))
        drawn = 0
        for (version, row), end in zip(sorted(parts.items()), ends, strict=False):
            mask = torch.tensor(row["response_mask"])
            drawn += int(mask.sum())
            limit = [0, 3, 6, 8][end]
            assert version in by_version and drawn <= limit
            assert row["finish_reason"] != "length" or drawn == limit
            expected = states[version](torch.tensor([row["tokens"]]), temperature=0.7)[0][mask].detach()
            torch.testing.assert_close(torch.tensor(row["log_probs"])[mask], expected, rtol=0, atol=1e-5)
            tokens[k][version] = tokens[k].get(version, 0) + int(mask.sum())
        assert row["finish_reason"] != "length" or drawn == 8
        seen.add((len(parts), row["finish_reason"]))
    assert {(1, "stop"), (2, "stop"), (3, "length")} <= seen
    logged = [row["staleness"] for row in read_metrics(tmp_path / "run") if "staleness" in row]
    behind = [sum(n * (k - v) for v, n in of_k.items()) / sum(of_k.values()) for k, of_k in tokens.items()]
    assert logged == pytest.approx(behind) and 1 < logged[5] < 3


def test_without_learning_parts_are_those_of_whole_responses(tiny_world, runtime, tmp_path, monkeypatch):
    """The same samples, so the same rewards, in every iteration."""
    changes = dict(steps=6, learning_rate=0.0, stop=["e"], min_new_tokens=4)
    train("grpo", tiny_world, runtime, tmp_path / "whole", **changes)
    train("grpo", tiny_world, runtime, tmp_path / "parts", monkeypatch, **changes, **PARTIAL)
    logs = [[row for row in read_metrics(tmp_path / name) if "rollout_kl" in row] for name in ("whole", "parts")]
    for whole, parts in zip(*logs, strict=True):
        for name in ("reward", "reward_std", "response_length", "finished"):
            assert parts[name] == whole[name]
        assert parts["rollout_kl"] < 1e-9
    assert 4 < logs[0][0]["response_length"] < 8


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_run_in_parts_that_goes_on_ends_the_same_and_draws_nothing_again(
    algorithm, tiny_world, runtime, tmp_path, monkeypatch
):
    changes = dict(steps=7, save_every=1, keep_checkpoints=10, stop=["e"], **PARTIAL)
    expected = train(algorithm, tiny_world, runtime, tmp_path / "run", monkeypatch, **changes)
    journal = sorted((tmp_path / "run" / JOURNAL).glob("*/*.jsonl"))
    written = {path: path.stat().st_mtime_ns for path in journal}
    for step in (1, 4, 6):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        again = train(algorithm, tiny_world, runtime, tmp_path / "run", monkeypatch, resume=str(checkpoint), **changes)
        assert_equal(expected, again)
        files = sorted((tmp_path / "run" / JOURNAL).glob("*/*.jsonl"))
        assert {path: path.stat().st_mtime_ns for path in files} == written


def test_what_does_not_go_with_generators_is_refused_in_words(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="max_staleness needs generators"):
        train("grpo", tiny_world, runtime, tmp_path / "run", max_staleness=1)
    for settings in (dict(dynamic_sampling=True), dict(rest_epochs=1)):
        with pytest.raises(UserError, match="can't be ahead"):
            train("grpo", tiny_world, runtime, tmp_path / "run", max_staleness=1, **settings)
    refusals = {
        "raise max_staleness to 2": dict(max_staleness=1),
        "leave it out, or environment": TALK | dict(max_staleness=2),
        "leave out final_temperature": dict(max_staleness=2, final_temperature=0.5),
    }
    for message, settings in refusals.items():
        with pytest.raises(UserError, match=message):
            train("grpo", tiny_world, runtime, tmp_path / "run", partial_rollouts=True, **settings)
    sft = configure(SFTConfig, **settings_for("sft", tiny_world, output_dir=str(tmp_path / "sft")))
    with pytest.raises(UserError, match="PPO, GRPO"):
        check_generators(sft)
