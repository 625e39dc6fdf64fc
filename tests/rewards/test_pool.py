"""Answers scored one at a time while others are generated: the same scores in any order, failures counted, processes
that hang or die replaced, and none left at the end."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from coati.errors import UserError
from coati.rewards import FunctionReward, ScoringConfig, WeightedRewards, load_function, load_rewards
from coati.rewards.pool import Pool
from coati.rewards.verifiable import ExactVerifier, GSM8KVerifier
from tests.conftest import ROOT

FUNCTIONS = """
import os, sys, time

def one(prompts, responses, **columns):
    [response] = responses
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "nan":
        return [float("nan")]
    if response == "pid":
        return [os.getpid()]
    if response == "torch":
        return ["torch" in sys.modules]
    return [float(response) + len(columns)]

one.per_response = True
"""
PROMPTS = [f"{i} + {i} =" for i in range(12)]
RESPONSES = [f"#### {2 * i + (i % 3 == 0)}" for i in range(12)]
COLUMNS = dict(answer=[str(2 * i) for i in range(12)], input_ids=torch.zeros(12, 3))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return f"{tmp_path}/functions.py:one"


@pytest.fixture
def make():
    """Makes rewards whose processes end with the test."""
    made = []

    def make(rewards, workers=1, **options):
        made.append(WeightedRewards(rewards, workers=workers, **options))
        return made[-1]

    yield make
    for rewards in made:
        if rewards.pool:
            rewards.pool.close()


def length(prompts, responses, **columns):
    return [len(r) - sum(map(len, responses)) / len(responses) for r in responses]


def mixed(make, workers: int) -> WeightedRewards:
    kinds = [(GSM8KVerifier(), 1.0), (FunctionReward(length), 0.1), (ExactVerifier(), 0.5), (GSM8KVerifier(), 0.3)]
    return make(kinds, workers)


def same(one, other):
    assert one.sequence.equal(other.sequence) and one.per_token is other.per_token is None
    assert list(one.parts) == list(other.parts) and list(one.seconds) == list(other.seconds)
    assert all(one.parts[name].equal(other.parts[name]) for name in one.parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_do_not_depend_on_what_was_submitted_when(make, workers):
    expected = mixed(make, 0).score(PROMPTS, RESPONSES, **COLUMNS)
    assert list(expected.parts) == [
        "gsm8k", "gsm8k/failed", "length", "exact", "exact/failed", "gsm8k_2", "gsm8k_2/failed"
    ]  # fmt: skip
    assert expected.parts["gsm8k"].tolist() == [float(i % 3 > 0) for i in range(12)]
    rewards = mixed(make, workers)
    same(expected, rewards.score(PROMPTS, RESPONSES, **COLUMNS))
    for seed in range(6):
        order = random.Random(seed).sample(range(12), 2 * seed)
        pending = rewards.start()
        for i in order:
            pending.submit(i, PROMPTS[i], RESPONSES[i], {"answer": COLUMNS["answer"][i]})
        same(expected, pending.finish(PROMPTS, RESPONSES, **COLUMNS))


def test_the_last_answer_submitted_for_a_place_counts(make):
    rewards = mixed(make, 1)
    pending = rewards.start()
    pending.submit(0, "other", "#### 5", {"answer": "5"})
    pending.submit(1, PROMPTS[1], "#### 7", {"answer": "2"})
    pending.submit(1, PROMPTS[1], RESPONSES[1], {"answer": "2"})
    same(rewards.score(PROMPTS, RESPONSES, **COLUMNS), pending.finish(PROMPTS, RESPONSES, **COLUMNS))


def test_workers_share_the_answers(make, place):
    rewards = make([(load_function(place), 1.0)], workers=2)
    pending = rewards.start()
    pending.submit(0, "", "1", {"answer": "x"})
    scores = pending.finish([""] * 3, ["1", "2", "3"], answer=["x"] * 3)
    assert scores.sequence.tolist() == [2.0, 3.0, 4.0]
    pids = {*rewards.score([""] * 40, ["pid"] * 40).sequence.tolist()}
    assert pids <= {float(w.process.pid) for w in rewards.pool.workers} and os.getpid() not in pids


def test_answers_are_scored_while_others_are_generated(make, place):
    rewards = make([(load_function(place), 1.0)])
    pending = rewards.start()
    pending.submit(0, "", "1", {})
    future = pending.submitted[0][2]["one"]
    assert future.result(timeout=60).score == 1.0  # without `finish`


def test_a_worker_imports_no_torch(make, place):
    rewards = make([(load_function(place), 1.0), (GSM8KVerifier(), 1.0)])
    assert rewards.score([""], ["torch"], answer=["1"]).parts["one"].tolist() == [0.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_are_counted_and_get_the_set_score(make, place, workers, caplog):
    """At hour nine: once a reward has worked, no answer can stop the run."""
    rewards = make([(load_function(place), 2.0)], workers, failure_score=-0.5)
    assert rewards.score([""], ["3"]).sequence.tolist() == [6.0]
    with caplog.at_level(logging.WARNING, logger="coati"):
        scores = rewards.score([""] * 3, ["1", "two", "nan"])
    assert scores.parts["one"].tolist() == [1.0, -0.5, -0.5] and scores.sequence.tolist() == [2.0, -1.0, -1.0]
    assert scores.parts["one/failed"].tolist() == [0.0, 1.0, 1.0]
    [line] = [r.getMessage() for r in caplog.records]
    assert "'one' failed for 2 of 3 answers, which get -0.5" in line and "finite, not nan" in line
    assert rewards.score([""] * 2, ["two", "two"]).parts["one/failed"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_never_works_stops_the_run_with_its_error(make, place, workers):
    rewards = make([(load_function(place), 1.0)], workers)
    with pytest.raises(
        UserError, match=r"'one' failed for all 2 answers, the last with ValueError: could not convert.*two"
    ):
        rewards.score([""] * 2, ["x", "two"])
    rewards = make([(GSM8KVerifier("solution"), 1.0)], workers)
    with pytest.raises(UserError, match=r"'gsm8k' failed for all .*reads the column 'solution'"):
        rewards.score(PROMPTS, RESPONSES, **COLUMNS)


def test_a_function_that_the_worker_cannot_import_stops_the_run(make, place):
    reward = load_function(place)
    reward.place = place.replace("functions.py", "moved.py")
    with pytest.raises(UserError, match=r"moved\.py does not exist"):
        make([(reward, 1.0)]).score([""], ["1"])


@pytest.mark.parametrize(
    ("response", "says"), [("hang", "no score within 1 s"), ("die", "the process that scored it ended")]
)
def test_a_worker_that_hangs_or_dies_is_replaced(make, place, response, says, caplog):
    rewards = make([(load_function(place), 1.0)], timeout=1.0)
    [before] = rewards.score([""], ["pid"]).sequence.tolist()
    started = time.monotonic()
    scores = rewards.score([""] * 3, ["1", response, "2"])
    assert time.monotonic() - started < 30
    assert scores.sequence.tolist() == [1.0, 0.0, 2.0] and scores.parts["one/failed"].tolist() == [0.0, 1.0, 0.0]
    assert says in caplog.text
    [after] = rewards.score([""], ["pid"]).sequence.tolist()
    assert after != before and not psutil.pid_exists(int(before))


def test_a_reward_given_as_an_object_stays_in_this_process(make):
    """Nobody else could make it."""

    class Object:
        name, per_response = "object", True

        def score(self, prompts, responses, **columns):
            assert len(responses) == 1 and "input_ids" not in columns
            return [os.getpid()]

    rewards = make([(Object(), 1.0)], workers=1)
    assert rewards.pool is None
    assert rewards.score(PROMPTS, RESPONSES, **COLUMNS).sequence.tolist() == [os.getpid()] * 12


def test_a_function_that_does_not_say_so_sees_the_whole_batch(place):
    assert load_function(place).per_response and not FunctionReward(length).per_response
    rewards = WeightedRewards([(FunctionReward(length), 1.0)])
    assert rewards.score([], ["a", "abc"], kind="any").sequence.tolist() == [-1.0, 1.0]


def test_closing_ends_the_processes_at_once(place):
    pool = Pool({"one": place}, 2, 60.0)
    [pool.submit("one", "", text, {}) for text in ("1", "1")][-1].result(60)
    pool.submit("one", "", "hang", {})
    pids = children()
    assert len(pids) == 2
    pool.close()
    gone(pids)


def test_a_pool_that_nobody_holds_ends(place):
    pool = Pool({"one": place}, 1, 60.0)
    pool.submit("one", "", "1", {}).result(60)
    pids = children()
    del pool
    gone(pids)


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children() if "coati.rewards.pool" in " ".join(p.cmdline())}


def gone(pids: set[int]):
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


SCRIPT = """
import sys, time
from coati.rewards import ScoringConfig, load_rewards
rewards = load_rewards(ScoringConfig(reward_functions=[sys.argv[1]]))
print(int(rewards.score([""], ["pid"]).sequence), flush=True)
pending = rewards.start()
pending.submit(0, "", "hang", {})
time.sleep(0.5)
print("hangs", flush=True)
if sys.argv[2] == "raise":
    raise SystemExit(1)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["raise", signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_trainer_however_it_ends(place, end):
    """While one of them hangs in an answer."""
    words = [sys.executable, "-c", SCRIPT, place, str(end)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    assert psutil.pid_exists(pid) and trainer.stdout.readline() == "hangs\n"
    if end != "raise":
        trainer.send_signal(end)
    trainer.wait(30)
    trainer.stdout.close()
    gone({pid})


def test_the_settings_reach_the_pool(make, place):
    config = ScoringConfig(verifiers=["gsm8k"], verifier_weights=[0.5], reward_functions=[place], reward_workers=2)
    rewards = load_rewards(config)
    assert len(rewards.pool.workers) == 2 and rewards.pool.workers[0].timeout == 60.0
    assert rewards.score([""], ["3"], answer=["3"]).sequence.tolist() == [4.5]
    rewards.pool.close()
    quiet = ScoringConfig(verifiers=["gsm8k"], reward_workers=0)
    assert load_rewards(quiet).pool is None
    for bad in (dict(reward_workers=-1), dict(reward_failure_score=float("nan")), dict(verifier_weights=[1.0, 2.0])):
        with pytest.raises(UserError, match=next(iter(bad))):
            load_rewards(ScoringConfig(verifiers=["gsm8k"], **bad))


def test_many_threads_and_batches_at_once_get_their_own_scores(make, place):
    rewards, results = make([(load_function(place), 1.0)], workers=2), {}

    def ask(k):
        results[k] = rewards.score([""] * 20, [str(k)] * 20).sequence.tolist()

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [float(k)] * 20 for k in range(4)}
