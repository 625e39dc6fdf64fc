"""Generators' parts: samples and weights as files, and what is said over HTTP."""

import json
import math
import threading
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from coati.models import Actor
from coati.models.lora import LoraSettings
from coati.rollout import GenerationConfig, Prompt
from coati.rollout.remote import Generators, RemoteSampler, Service, WeightVersions, client, load_weights
from coati.rollout.remote.address import Address
from coati.rollout.remote.journal import read_samples, remove_before, write_samples
from coati.rollout.remote.server import Job, serve_in_thread
from coati.rollout.remote.weights import weights_of, write_weights
from coati.rollout.sampler import Sampled
from coati.samples import Sample, Turn
from coati.variables import GENERATORS, GENERATORS_FOLDER
from tests.kills import killed_before

TEXTS = st.text(max_size=8)
LOG_PROBS = st.floats(max_value=0, width=32, allow_nan=False)


@st.composite
def samples(draw) -> tuple[Prompt, Sample]:
    tokens = draw(st.lists(st.integers(0, 2**31), min_size=1, max_size=6))
    columns = {"answer": draw(TEXTS)}
    prompt = Prompt(draw(st.integers(0, 99)), draw(st.lists(st.integers(0, 2**40), max_size=4)), tokens, "", columns)
    log_probs = draw(st.none() | st.lists(LOG_PROBS, min_size=len(tokens), max_size=len(tokens)))
    sample = Sample(
        row=prompt.row,
        columns=columns,
        prompt=draw(TEXTS),
        response=draw(TEXTS),
        tokens=tokens,
        response_mask=draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))),
        log_probs=log_probs,
        heads=[(np.array([token, 7]), np.array([-0.1, -2.3], np.float32)) for token in tokens],
        routing=draw(st.none() | st.just(np.arange(2 * 3 * len(tokens), dtype=np.int16).reshape(-1, 2, 3))),
        finish_reason=draw(st.sampled_from(["eos", "length", "done", "failed"])),
        weights_version=draw(st.integers(0, 9)),
        turns=[Turn(0, 1, draw(st.floats(allow_nan=False)))],
        messages=[{"role": "user", "content": draw(TEXTS)}],
        metrics={"won": 1.0},
    )
    return prompt, sample


@given(st.lists(samples(), min_size=1, max_size=4))
def test_samples_are_what_was_written(pairs):
    """Every text that JSON has, minus infinity, and floats to the last bit."""
    import tempfile

    prompts, written = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "version-00000000" / "job.jsonl"
        write_samples(path, {"job": "job"}, prompts, written)
        header, found = read_samples(path, prompts)
    assert header == {"job": "job"} and [as_lists(s) for s in found] == [as_lists(s) for s in written]


def as_lists(sample: Sample) -> dict:
    """A sample whose arrays can be compared; with their dtypes."""
    heads = [(ids.tolist(), log_probs.tolist(), ids.dtype, log_probs.dtype) for ids, log_probs in sample.heads]
    routing = None if sample.routing is None else (sample.routing.tolist(), sample.routing.dtype)
    return asdict(sample) | {"heads": heads, "routing": routing}


def one_sample(prompt: Prompt, version: int = 0, response: str = "yes") -> Sample:
    tokens = [*prompt.input_ids, 7]
    mask = [False] * len(prompt.input_ids) + [True]
    return Sample(prompt.row, prompt.columns, prompt.text, response, tokens, mask, [0.0] * len(mask), "eos", version)


PROMPTS = [Prompt(row, [0, row], [1, 2, 3 + row], "ask", {"answer": str(row)}) for row in range(3)]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "gone"])
def test_a_damaged_file_of_samples_counts_as_none(damage, tmp_path):
    path = tmp_path / "job.jsonl"
    write_samples(path, {}, PROMPTS, [one_sample(prompt) for prompt in PROMPTS])
    text = path.read_text()
    match damage:
        case "cut":
            path.write_text(text[: len(text) // 2])
        case "changed":
            path.write_text(text.replace("yes", "no!", 1))
        case "empty":
            path.write_text("")
        case "gone":
            path.unlink()
    assert read_samples(path, PROMPTS) is None


def test_a_kill_leaves_all_samples_of_a_job_or_none(tmp_path):
    path, operation = tmp_path / "job.jsonl", 0

    def write():
        write_samples(path, {}, PROMPTS, [one_sample(prompt) for prompt in PROMPTS])

    while killed_before(operation, tmp_path, write):
        found = read_samples(path, PROMPTS)
        assert found is None or len(found[1]) == 3
        operation += 1
    assert operation > 2 and len(read_samples(path, PROMPTS)[1]) == 3


def test_what_old_weights_have_sampled_can_be_removed(tmp_path):
    for version in (0, 3, 12):
        write_samples(tmp_path / f"version-{version:08d}" / "job.jsonl", {}, [], [])
    remove_before(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-00000003", "version-00000012"]


# --- weights


@pytest.fixture
def policy(tiny_world) -> Actor:
    return Actor(tiny_world["policy"])


@pytest.mark.parametrize("adapted", [False, True])
def test_a_policy_with_the_weights_of_a_file_is_the_one_that_wrote_it(adapted, tiny_world, tmp_path):
    lora = LoraSettings(2) if adapted else None
    theirs, mine = (Actor(tiny_world["policy"], lora=lora) for _ in range(2))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    weights = weights_of(theirs, theirs.state_dict(), torch.float32)
    checksum = write_weights(tmp_path / "weights", weights)
    load_weights(mine, tmp_path / "weights", checksum)
    expected, found = theirs.state_dict(), mine.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all("lora_" in name for name in weights) == adapted


@pytest.mark.parametrize("wrong", ["bytes", "name", "shape", "missing"])
def test_other_weights_are_refused_and_leave_the_policy_as_it_was(wrong, policy, tmp_path):
    weights, path = weights_of(policy, policy.state_dict(), torch.float32), tmp_path / "weights"
    first = next(iter(weights))
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    match wrong:
        case "name":
            weights["model.other"] = weights.pop(first)
        case "shape":
            weights[first] = weights[first][:1]
        case "missing":
            del weights[first]
    checksum = write_weights(path, weights)
    if wrong == "bytes":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match="weights"):
        load_weights(policy, path, checksum)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def versions_of(policy, runtime, folder: Path, staleness: int = 1) -> WeightVersions:
    return WeightVersions(folder, policy.state_dict, policy, torch.float32, runtime, staleness)


def test_versions_stay_as_long_as_they_may_be_sampled_with(policy, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path / "weights", staleness=2)
    for k in range(5):
        versions.publish(k)
    names = [f"version-{k:08d}.safetensors" for k in (2, 3, 4)]
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == names
    (tmp_path / "checkpoint").mkdir()
    versions.save(tmp_path / "checkpoint" / "weights", 4)
    for k in range(5, 8):  # what a run does that is killed then
        versions.publish(k)
    resumed = versions_of(policy, runtime, tmp_path / "weights", staleness=2)
    resumed.load(tmp_path / "checkpoint" / "weights", 4)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == names[:2]
    assert list(resumed.checksums) == [2, 3]


# --- jobs


class Echo:
    """A sampler that says which weights were loaded when it sampled."""

    plays_episodes = False

    def __init__(self):
        self.loaded, self.sampled, self.error, self.gate = [], 0, None, threading.Event()
        self.gate.set()

    def load(self, path: Path, checksum: str, loaded: str):
        self.loaded.append(path.name)

    def sample(self, prompts, sampling, version=0, on_sample=None):
        self.gate.wait()
        self.sampled += 1
        if self.error is not None:
            raise self.error
        return Sampled([one_sample(prompt, version, self.loaded[-1]) for prompt in prompts], {"environment": 1.5})


class Silent:
    """A sampler without samples."""

    plays_episodes = False

    def sample(self, prompts, sampling, version=0, on_sample=None):
        return Sampled([], {})


class Served:
    """A generator of this process."""

    def __init__(self, folder: Path, number: int = 0, count: int = 1):
        self.echo = Echo()
        self.service = Service(self.echo, self.echo.load)
        threading.Thread(target=self.service.run, daemon=True).start()
        self.generators = Generators(folder, count)
        self.port = serve_in_thread(self.service, "127.0.0.1", "secret")
        self.generators.announce(number, Address(f"http://127.0.0.1:{self.port}", "secret"))


@pytest.fixture
def served(tmp_path):
    (tmp_path / "addresses").mkdir()
    served = Served(tmp_path / "addresses")
    yield served
    served.service.stop()


def sampler_of(generators: Generators, versions: WeightVersions, folder: Path, **changes) -> RemoteSampler:
    options = dict(plays_episodes=False, settings={}, rank=0, world_size=1) | changes
    return RemoteSampler(generators, versions, folder / "journal", **options)


def test_samples_come_from_the_weights_that_were_asked_for_and_only_once(served, policy, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path / "weights", staleness=9)
    for k in range(2):
        with torch.no_grad():
            next(policy.parameters()).add_(1)
        versions.publish(k)
    sampler, sampling, seen = sampler_of(served.generators, versions, tmp_path), GenerationConfig(), []
    for version in (0, 1, 1, 0):
        sampled = sampler.sample(PROMPTS, sampling, version, lambda i, sample: seen.append((i, sample)))
        found = sampled.samples
        assert sampled.seconds["environment"] == 1.5 and set(sampled.seconds) == {"load", "generate", "environment"}
        assert [sample.response for sample in found] == [versions.path(version).name] * 3
        assert [sample.weights_version for sample in found] == [version] * 3
        assert [sample.columns for sample in found] == [prompt.columns for prompt in PROMPTS]
        assert seen[-3:] == list(enumerate(found))
    assert served.echo.sampled == 2 and served.echo.loaded == [versions.path(k).name for k in (0, 1)]
    sampler.sample(PROMPTS, GenerationConfig(temperature=0.5), 1)
    sampler.sample(PROMPTS[:2], sampling, 1)
    assert served.echo.sampled == 4


@pytest.mark.parametrize(
    ("error", "raised"), [(UserError("raise max_tokens"), UserError), (KeyError("x"), RuntimeError)]
)
def test_what_fails_on_a_generator_fails_where_it_was_asked_for(error, raised, served, policy, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path / "weights")
    versions.publish(0)
    served.echo.error = error
    with pytest.raises(raised, match="raise max_tokens" if raised is UserError else "KeyError"):
        sampler_of(served.generators, versions, tmp_path).sample(PROMPTS, GenerationConfig())
    served.echo.error = None
    assert list((tmp_path / "journal").rglob("*.jsonl")) == []


def test_a_job_of_a_generator_that_is_gone_goes_to_another_one(served, policy, runtime, tmp_path, monkeypatch):
    """One isn't ready yet, one refuses connections, one has another token; the fourth is there."""
    monkeypatch.setattr(client, "SECONDS_BETWEEN_TRIES", 0.0)
    versions = versions_of(policy, runtime, tmp_path / "weights")
    versions.publish(0)
    generators = Generators(tmp_path / "others", 4)
    generators.folder.mkdir()
    generators.announce(1, Address("http://127.0.0.1:9", "secret"))
    generators.announce(2, Address(f"http://127.0.0.1:{served.port}", "old"))
    generators.announce(3, Address(f"http://127.0.0.1:{served.port}", "secret"))
    assert len(sampler_of(generators, versions, tmp_path).sample(PROMPTS, GenerationConfig()).samples) == 3
    assert served.echo.sampled == 1


def test_a_generator_that_has_forgotten_a_job_is_asked_again(served, policy, runtime, tmp_path, monkeypatch):
    """It was started again, at the same address, while the job was waited for."""
    monkeypatch.setattr(client, "SECONDS_TO_WAIT", 0.01)
    versions = versions_of(policy, runtime, tmp_path / "weights")
    versions.publish(0)
    sampler, found = sampler_of(served.generators, versions, tmp_path), []
    served.echo.gate.clear()
    asking = threading.Thread(target=lambda: found.extend(sampler.sample(PROMPTS, GenerationConfig()).samples))
    asking.start()
    while not served.service.jobs:
        pass
    served.service.jobs.clear()
    served.echo.gate.set()
    asking.join()
    assert len(found) == 3


def test_nobody_gets_in_without_the_token(served):
    url = f"http://127.0.0.1:{served.port}"
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        for method, path in (("GET", "/health"), ("POST", "/jobs"), ("GET", "/jobs/1"), ("GET", "/nothing")):
            assert httpx.request(method, url + path, headers=headers, trust_env=False).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    answer = httpx.get(url + "/health", headers=headers, trust_env=False)
    assert answer.json() == {"version": -1, "jobs": 0}
    for junk in (b"", b"[]", b'{"id": 1}', b"\xff" * 1000):
        assert httpx.post(url + "/jobs", content=junk, headers=headers, trust_env=False).status_code == 400
    assert served.service.jobs == {}


def test_the_address_of_a_generator_is_for_its_user_alone(served):
    assert served.generators.path(0).stat().st_mode & 0o777 == 0o600


def test_rows_that_cant_be_sent_to_an_environment_are_refused_in_words(served, policy, runtime, tmp_path):
    versions = versions_of(policy, runtime, tmp_path / "weights")
    versions.publish(0)
    sampler = sampler_of(served.generators, versions, tmp_path, plays_episodes=True)
    with pytest.raises(UserError, match="JSON"):
        sampler.sample([Prompt(0, [0], [], "", {"when": object()})], GenerationConfig())


@pytest.mark.parametrize("variables", [{GENERATORS: "2"}, {GENERATORS: "0", GENERATORS_FOLDER: "/tmp"}])
def test_variables_that_say_half_are_refused(variables, monkeypatch):
    for name in (GENERATORS, GENERATORS_FOLDER):
        monkeypatch.delenv(name, raising=False)
    assert Generators.from_environment() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=GENERATORS):
        Generators.from_environment()


def test_a_generator_forgets_what_it_has_if_other_weights_fail_to_load(tmp_path):
    """Else differences would be added to weights that nobody knows."""
    calls = []

    def load(path: Path, checksum: str, loaded: str):
        calls.append((checksum, loaded))
        if checksum == "second":
            raise RuntimeError("damaged")

    service = Service(Silent(), load)
    for checksum in ("first", "second", "third"):
        service.submit(Job.of(checksum, 0, tmp_path, checksum, GenerationConfig(), [], tmp_path / checksum))
    service.stop()
    service.run()
    assert calls == [("first", ""), ("second", "first"), ("third", "")]


def test_a_job_is_what_json_has(tmp_path):
    job = Job.of("a", 1, tmp_path, "c", GenerationConfig(stop=["x"]), PROMPTS, tmp_path / "b.jsonl")
    again = Job(**json.loads(json.dumps(asdict(job))))
    assert again == job and GenerationConfig(**again.sampling) == GenerationConfig(stop=["x"])
    assert math.isclose(again.sampling["temperature"], 1.0)
