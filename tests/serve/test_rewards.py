"""`coati serve-reward`: what it gives is what the same rewards give in a run's own process."""

import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from coati.errors import UserError
from coati.listening import listen
from coati.models import RewardModel
from coati.rewards import FunctionReward, HTTPReward, Reward, Scorer, ScoringConfig, load_rewards
from coati.rewards.model import ModelReward
from coati.serve import server
from coati.serve.rewards import RewardService, application, load_model_reward, main, split_by_length
from tests.conftest import ROOT
from tests.rewards.samples import rewards_of, samples

PATIENCE = 120  # seconds for what should come at once
PLAIN = httpx.Client(timeout=PATIENCE)


class Served:
    """Rewards behind HTTP, in threads of this process."""

    def __init__(self, *rewards: Reward, token: str | None = None, **limits):
        self.service = RewardService(Scorer([(reward, 1.0) for reward in rewards]), **limits)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = (application(self.service, token), self.service, listener)
        threading.Thread(target=server.run, args=arguments, daemon=True).start()

    def post(self, responses=("x",), **more) -> httpx.Response:
        body = {"prompts": [""] * len(responses), "responses": list(responses)} | more
        return PLAIN.post(f"{self.url}/score", json=body)

    def client(self, **options) -> HTTPReward:
        return HTTPReward(f"{self.url}/score", **{"timeout": PATIENCE, "wait": 0.01} | options)


def length(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


class Held(Reward):
    """Scores when it is let, and notes how many responses came together."""

    name = "held"

    def __init__(self):
        self.go, self.begun, self.sizes = threading.Event(), threading.Event(), []

    def score(self, samples):
        self.begun.set()
        assert self.go.wait(PATIENCE)
        self.sizes.append(len(samples))
        if any(sample.response == "bad" for sample in samples):
            raise ValueError("a planted fault")
        return [float(len(sample.response)) for sample in samples]


@pytest.fixture(scope="module")
def scorer_folder(tiny_world, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("served") / "reward")
    torch.manual_seed(0)
    model = RewardModel(config=AutoConfig.from_pretrained(tiny_world["policy"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_world["policy"]).save_pretrained(folder)
    return folder


def tokenized(folder: str, count: int):
    """Samples whose ids no tokenizer would choose, some of them truncated."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = samples([f"red {i}" for i in range(count)], ["blue " * (i % 7) for i in range(count)])
    for i, sample in enumerate(made):
        asked, said = tokenizer(sample.prompt)["input_ids"], [5 + (7 * i + j) % 60 for j in range(1 + i % 9)]
        sample.tokens, sample.response_mask = asked + said, [False] * len(asked) + [True] * len(said)
        sample.finish_reason = "length" if i % 3 == 0 else "eos"
    return made


def test_a_served_reward_model_gives_the_local_scores(scorer_folder):
    """By ids, in requests of several sizes; without ids by the texts."""
    model = RewardModel(scorer_folder).eval()
    local = ModelReward(lambda batches: [model(**b) for b in batches], 0, torch.device("cpu"), split_by_length)
    asked = tokenized(scorer_folder, 23)
    expected = torch.tensor(local.score(asked).tolist())
    running = Served(load_model_reward(scorer_folder))
    for size in (1, 5, 64):
        found = running.client(send_ids=True, batch_size=size).score(asked)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(scorer_folder)
    by_text = samples(["red blue"] * 2, ["the lamp"] * 2)
    by_text[1].finish_reason = "length"
    found = running.client().score(by_text)
    ids = tokenizer("red blue", add_special_tokens=False)["input_ids"]
    ids += tokenizer("the lamp", add_special_tokens=False)["input_ids"]
    ends = [ids + [tokenizer.eos_token_id], ids]
    assert found == pytest.approx([model(torch.tensor([row])).item() for row in ends], abs=1e-5)


def test_rules_are_served_with_their_columns_and_workers():
    scorer = load_rewards(rewards_of("exact", "gsm8k"), ScoringConfig(reward_workers=1))
    running = Served(FunctionReward(length))
    running.service.scorer = scorer
    asked = samples([""] * 3, ["18", "#### 18", "no"], answer=["18", "18", "18"])
    assert running.client().score(asked) == [2.0, 1.0, 0.0]
    reply = running.post(["18"], columns={"answer": ["18"]}).json()
    assert reply == {"rewards": [2.0], "by_reward": {"exact": [1.0], "gsm8k": [1.0]}}


def test_requests_that_wait_are_scored_together():
    held = Held()
    running = Served(held, max_batch=6)
    found: dict[int, list] = {}

    def ask(i: int):
        found[i] = running.post(["y" * i] * 2).json()["rewards"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    threads[0].start()
    assert held.begun.wait(PATIENCE)
    for thread in threads[1:]:
        thread.start()
    until(lambda: running.service.number_waiting() == 8)
    held.go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == {i: [float(i)] * 2 for i in range(5)}
    assert held.sizes == [2, 6, 2]


def test_a_full_queue_answers_429_and_the_client_comes_again():
    held = Held()
    running = Served(held, max_queue=2)
    first = threading.Thread(target=running.post)
    first.start()
    assert held.begun.wait(PATIENCE)
    second = threading.Thread(target=running.post, args=(["a", "b"],))
    second.start()
    until(lambda: running.service.number_waiting() == 2)
    refused = running.post(["c"])
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    threading.Timer(0.05, held.go.set).start()
    assert running.client(retries=20).score(samples([""], ["later"])) == [5.0]
    first.join(PATIENCE)
    second.join(PATIENCE)


def test_the_fault_of_one_request_is_not_that_of_its_neighbors():
    held = Held()
    running = Served(held)
    replies: dict[str, httpx.Response] = {}

    def ask(response: str):
        replies[response] = running.post([response])

    threads = [threading.Thread(target=ask, args=(response,)) for response in ("first", "bad", "good")]
    threads[0].start()
    assert held.begun.wait(PATIENCE)
    for thread in threads[1:]:
        thread.start()
    until(lambda: running.service.number_waiting() == 2)
    held.go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert {name: reply.status_code for name, reply in replies.items()} == {"first": 200, "bad": 500, "good": 200}
    assert running.post(["after"]).json()["rewards"] == [5.0]
    assert "coati_reward_requests_failed_total 1.0" in PLAIN.get(f"{running.url}/metrics").text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([], "no object"),
        ({"responses": ["x"]}, "prompts is no list of texts"),
        ({"prompts": ["x"], "responses": [3]}, "responses is no list of texts"),
        ({"prompts": ["x", "y"], "responses": ["x"]}, "prompts has no entry for each of 1 responses"),
        ({"prompts": ["x"], "responses": ["x"], "columns": {"answer": ["1", "2"]}}, "answer has no entry for each"),
        ({"prompts": ["x"], "responses": ["x"], "columns": 3}, "columns is no object"),
        ({"prompts": ["x"], "responses": ["x"], "input_ids": [[3]]}, "belong together"),
        ({"prompts": ["x"], "responses": ["x"], "input_ids": [[3]], "response_masks": [[1]]}, "no token ids"),
        ({"prompts": ["x"], "responses": ["x"], "input_ids": [[-3]], "response_masks": [[True]]}, "no token ids"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(body, says, plain_server):
    reply = PLAIN.post(f"{plain_server.url}/score", json=body)
    assert reply.status_code == 400 and says in reply.json()["error"]


@pytest.fixture(scope="module")
def plain_server():
    return Served(FunctionReward(length), max_body=2**12)


def test_limits_of_a_body_and_an_empty_request(plain_server):
    assert plain_server.post(["x" * 2**13]).status_code == 413
    assert PLAIN.post(f"{plain_server.url}/score", content=b"{").status_code == 400
    assert plain_server.post([]).json() == {"rewards": [], "by_reward": {}}


def test_without_the_token_nobody_gets_in(monkeypatch):
    running = Served(FunctionReward(length), token="secret")
    assert running.post().status_code == 401 and PLAIN.get(f"{running.url}/health").status_code == 401
    monkeypatch.setenv("MY_TOKEN", "secret")
    [entry] = rewards_of({"type": "http", "url": f"{running.url}/score", "token_variable": "MY_TOKEN"})
    assert entry.make("cpu").score(samples([""], ["four"])) == [4.0]


def test_several_servers_share_the_requests_and_one_that_dies_is_passed_by(plain_server, caplog):
    """A closed port stands for the server that was killed: it is asked once, and then last."""
    other = Served(FunctionReward(length))
    with listen("127.0.0.1", 0) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
    reward = HTTPReward([dead, f"{plain_server.url}/score", f"{other.url}/score"], batch_size=2, timeout=PATIENCE)
    before = plain_server.service.scored
    asked = samples([""] * 40, ["y" * i for i in range(40)])
    assert reward.score(asked) == [float(i) for i in range(40)]
    shares = plain_server.service.scored - before, other.service.scored
    assert sum(shares) == 40 and min(shares) >= 10
    assert len([r for r in caplog.records if dead in r.getMessage()]) <= 3


@pytest.mark.slow
def test_two_thousand_requests_of_fifty_clients_are_all_answered():
    running = Served(FunctionReward(length), max_queue=10**5)
    wrong: list = []

    def ask(client: int):
        with httpx.Client(timeout=PATIENCE) as mine:
            for i in range(40):
                text = "z" * (client + i)
                reply = mine.post(f"{running.url}/score", json={"prompts": [""], "responses": [text]})
                if reply.status_code != 200 or reply.json()["rewards"] != [float(len(text))]:
                    wrong.append(reply.text)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == [] and running.service.scored == 2000


def test_the_command_serves_until_sigterm(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "COATI_TOKEN"}
    command = [sys.executable, "-m", "coati.cli", "serve-reward", "--rewards", "exact", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"serving exact at (http://127.0.0.1:\d+)/score\n", line)[1]
            body = {"prompts": ["?"], "responses": ["Paris"], "columns": {"answer": ["paris"]}}
            assert PLAIN.post(f"{url}/score", json=body).json()["rewards"] == [1.0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no reward: give `rewards`"),
        (["--rewards", "exact", "--host", "0.0.0.0"], "can be reached from other machines"),
    ],
)
def test_what_cannot_be_served_is_one_line(argv, says, monkeypatch):
    monkeypatch.delenv("COATI_TOKEN", raising=False)
    with pytest.raises(UserError, match=re.escape(says)):
        main(argv)


def test_rows_of_like_length_are_read_together():
    assert split_by_length([3, 9000, 4, 8000, 5, 1]) == [[1], [3, 4], [2, 0, 5]]


def until(holds):
    """Waits until something holds."""
    for _ in range(100 * PATIENCE):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to hold")
