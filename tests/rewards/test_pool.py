"""Responses scored one at a time while others are generated: the same scores in any order, failures counted, processes
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

from coati.config import configure
from coati.errors import UserError
from coati.rewards import FunctionReward, Reward, Scorer, ScoringConfig, load_function, load_rewards
from coati.rewards.pool import Pool
from coati.rewards.verifiable import ExactVerifier, GSM8KVerifier
from coati.samples import Sample
from tests.conftest import ROOT, functions
from tests.rewards.samples import of_reward, rewards_of, samples, scored, totals

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
ANSWERS = [str(2 * i) for i in range(12)]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return f"{tmp_path}/functions.py:one"


@pytest.fixture
def make():
    """Makes rewards whose processes end with the test."""
    made = []

    def make(rewards, workers=1, **options):
        made.append(Scorer(rewards, workers=workers, **options))
        return made[-1]

    yield make
    for rewards in made:
        if rewards.pool:
            rewards.pool.close()


def length(prompts, responses, **columns):
    return [len(r) - sum(map(len, responses)) / len(responses) for r in responses]


def asked() -> list[Sample]:
    return samples(PROMPTS, RESPONSES, answer=ANSWERS)


def mixed(make, workers: int) -> Scorer:
    kinds = [(GSM8KVerifier(), 1.0), (FunctionReward(length), 0.1), (ExactVerifier(), 0.5), (GSM8KVerifier(), 0.3)]
    return make(kinds, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_do_not_depend_on_what_was_begun_when(make, workers):
    expected = scored(mixed(make, 0), PROMPTS, RESPONSES, answer=ANSWERS)
    assert [*expected[0].rewards] == ["gsm8k", "length", "exact", "gsm8k_2"]
    assert [*expected[0].failed] == ["gsm8k", "exact", "gsm8k_2"] and not any(expected[0].failed.values())
    assert of_reward("gsm8k", expected) == [float(i % 3 > 0) for i in range(12)]
    rewards = mixed(make, workers)
    made = asked()
    assert [*rewards.score(made)] == [*expected[0].rewards] and made == expected
    for seed in range(6):
        made, begun = asked(), [{}] * 12
        for i in random.Random(seed).sample(range(12), 12):
            begun[i] = rewards.begin(made[i])
        rewards.score(made, begun)
        assert made == expected


def test_workers_share_the_responses(make, place):
    rewards = make([(load_function(place), 1.0)], workers=2)
    assert totals(rewards, ["1", "2", "3"], answer=["x"] * 3) == [5.0, 6.0, 7.0]
    pids = {*totals(rewards, ["pid"] * 40)}
    assert pids <= {float(w.process.pid) for w in rewards.pool.workers} and os.getpid() not in pids


def test_responses_are_scored_while_others_are_generated(make, place):
    rewards = make([(load_function(place), 1.0)])
    [sample] = samples([""], ["1"])
    assert rewards.begin(sample)["one"].result(timeout=60).score == 4.0  # without `score`


def test_a_worker_imports_no_torch(make, place):
    rewards = make([(load_function(place), 1.0), (GSM8KVerifier(), 1.0)])
    assert of_reward("one", scored(rewards, [""], ["torch"], answer=["1"])) == [0.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_are_counted_and_get_the_set_score(make, place, workers, caplog):
    """At hour nine: once a reward has worked, no response can stop the run."""
    rewards = make([(load_function(place), 2.0)], workers, failure_score=-0.5)
    assert totals(rewards, ["3"]) == [12.0]
    with caplog.at_level(logging.WARNING, logger="coati"):
        found = scored(rewards, [""] * 3, ["1", "two", "nan"])
    assert of_reward("one", found) == [4.0, -0.5, -0.5] and [s.score for s in found] == [8.0, -1.0, -1.0]
    assert [s.failed for s in found] == [{"one": False}, {"one": True}, {"one": True}]
    [line] = [r.getMessage() for r in caplog.records]
    assert "'one' failed for 2 of 3 responses, which get -0.5" in line and "finite, not nan" in line
    assert [s.failed["one"] for s in scored(rewards, [""] * 2, ["two", "two"])] == [True, True]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_never_works_stops_the_run_with_its_error(make, place, workers):
    rewards = make([(load_function(place), 1.0)], workers)
    with pytest.raises(
        UserError, match=r"'one' failed for all 2 responses, the last with ValueError: could not convert.*two"
    ):
        totals(rewards, ["x", "two"])
    rewards = make([(GSM8KVerifier("solution"), 1.0)], workers)
    with pytest.raises(UserError, match=r"'gsm8k' failed for all .*reads the column 'solution'"):
        rewards.score(asked())


def test_a_function_that_the_worker_cannot_import_stops_the_run(make, place):
    reward = load_function(place)
    reward.worker_spec = place.replace("functions.py", "moved.py")
    with pytest.raises(UserError, match=r"moved\.py does not exist"):
        totals(make([(reward, 1.0)]), ["1"])


@pytest.mark.parametrize(
    ("response", "says"), [("hang", "no score within 1 s"), ("die", "the process that scored it ended")]
)
def test_a_worker_that_hangs_or_dies_is_replaced(make, place, response, says, caplog):
    rewards = make([(load_function(place), 1.0)], timeout=1.0)
    [before] = totals(rewards, ["pid"])
    started = time.monotonic()
    found = scored(rewards, [""] * 3, ["1", response, "2"])
    assert time.monotonic() - started < 30
    assert of_reward("one", found) == [4.0, 0.0, 5.0] and [s.failed["one"] for s in found] == [False, True, False]
    assert says in caplog.text
    [after] = totals(rewards, ["pid"])
    assert after != before and not psutil.pid_exists(int(before))


def test_a_reward_given_as_an_object_stays_in_this_process(make):
    """Nobody else could make it."""

    class Object(Reward):
        name, per_response = "object", True

        def score(self, samples):
            assert len(samples) == 1
            return [os.getpid()]

    rewards = make([(Object(), 1.0)], workers=1)
    assert rewards.pool is None
    assert totals(rewards, RESPONSES) == [os.getpid()] * 12


def test_a_function_that_does_not_say_so_sees_the_whole_batch(place):
    assert load_function(place).per_response and not FunctionReward(length).per_response
    assert totals(Scorer([(FunctionReward(length), 1.0)]), ["a", "abc"], kind=["any", "any"]) == [-1.0, 1.0]


def test_closing_ends_the_processes_at_once(place):
    pool = Pool({"one": place}, 2, 60.0)
    [pool.submit("one", sample) for sample in samples([""] * 2, ["1", "1"])][-1].result(60)
    pool.submit("one", *samples([""], ["hang"]))
    pids = children()
    assert len(pids) == 2
    pool.close()
    gone(pids)


def test_a_pool_that_nobody_holds_ends(place):
    pool = Pool({"one": place}, 1, 60.0)
    pool.submit("one", *samples([""], ["1"])).result(60)
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
from tests.conftest import functions
from tests.rewards.samples import rewards_of, samples, totals
rewards = load_rewards(rewards_of(*functions(sys.argv[1])), ScoringConfig(reward_workers=1))
print(int(totals(rewards, ["pid"])[0]), flush=True)
rewards.begin(*samples([""], ["hang"]))
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
    listed = rewards_of(dict(type="gsm8k", weight=0.5), *functions(place))
    rewards = load_rewards(listed, ScoringConfig(reward_workers=2))
    assert len(rewards.pool.workers) == 2 and rewards.pool.workers[0].timeout == 60.0
    assert totals(rewards, ["3"], answer=["3"]) == [7.5]
    rewards.pool.close()
    assert load_rewards(rewards_of("gsm8k"), ScoringConfig(reward_workers=0)).pool is None
    for bad in (dict(reward_workers=-1), dict(reward_failure_score=float("nan"))):
        with pytest.raises(UserError, match=next(iter(bad))):
            configure(ScoringConfig, **bad)


def test_many_threads_and_batches_at_once_get_their_own_scores(make, place):
    rewards, results = make([(load_function(place), 1.0)], workers=2), {}

    def ask(k):
        results[k] = totals(rewards, [str(k)] * 20)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [k + 3.0] * 20 for k in range(4)}
