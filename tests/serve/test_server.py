"""`coati serve` by HTTP, driven by OpenAI's client and by plain requests."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, TopPLogitsWarper

from coati.cli import main
from coati.errors import UserError
from coati.listening import listen
from coati.models import Actor
from coati.models.opened import open_model
from coati.rollout.engine.batch import ContinuousBatch
from coati.rollout.engine.live import LiveSampler, nucleus_of
from coati.rollout.generator import Completion
from coati.run_layout import model_folder, named_models
from coati.serve import server
from coati.serve.application import Service, application
from coati.serve.protocol import Wanted
from coati.serve.worker import Worker
from tests.conftest import ROOT
from tests.docs.pages import blocks

LONGEST = 2048
PATIENCE = 120  # seconds for what should come at once
PLAIN = httpx.Client(timeout=PATIENCE, verify=False)  # one for all: reading certificates takes a while
CHAT = [{"role": "user", "content": "red blue lamp"}]


@pytest.fixture(scope="module")
def folder(tiny_world, tmp_path_factory):
    """A tiny model that reads long texts, with far from flat distributions."""
    place = tmp_path_factory.mktemp("served") / "tiny"
    config = LlamaConfig.from_pretrained(tiny_world["policy"], max_position_embeddings=LONGEST, initializer_range=0.2)
    torch.manual_seed(1)
    Actor(config=config).save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_world["policy"]).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def opened(folder):
    return open_model(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def worker(opened):
    worker = Worker("tiny", opened, slots=64, max_queue=256, max_length=LONGEST)
    worker.start()
    yield worker
    worker.close()
    worker.thread.join(PATIENCE)


@pytest.fixture(scope="module")
def address(worker):
    listener = listen("127.0.0.1", 0)
    service = Service({"tiny": worker}, 2**20)
    thread = threading.Thread(target=server.run, args=(application(service, None), service, listener), daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def post(address: str, path: str, **body) -> httpx.Response:
    return PLAIN.post(f"{address}/v1/{path}", json={"model": "tiny"} | body)


def complete(address: str, **body) -> dict:
    answer = post(address, "completions", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(lines) -> list[dict]:
    """The chunks of a stream, which must end as the API says."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def metric(address: str, name: str) -> int:
    lines = PLAIN.get(f"{address}/metrics").text.splitlines()
    return next(int(float(line.split()[-1])) for line in lines if re.match(f"{name}\\b", line))


def wait_until(holds):
    give_up = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# --- what is generated


def test_greedy_is_transformers_own(address, opened):
    for prompt in ("red lamp", "thank you 你好", "a"):
        ids = opened.tokenizer(prompt)["input_ids"]
        expected = opened.actor.transformer.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=40, pad_token_id=2
        )[0, len(ids) :].tolist()
        found = complete(address, prompt=prompt, max_tokens=40, temperature=0, logprobs=0)
        text = opened.tokenizer.decode([id for id in expected if id not in (1, 2)])
        assert found["choices"][0]["text"] == text
        assert found["usage"] == {
            "prompt_tokens": len(ids),
            "completion_tokens": len(expected),
            "total_tokens": len(ids) + len(expected),
        }
        assert found["choices"][0]["finish_reason"] == ("stop" if expected[-1] == 1 else "length")


def test_log_probs_are_those_of_a_forward_pass(client, address, opened):
    """Whatever the temperature, they are the model's own; of a prompt (echo) as of a response."""
    found = client.completions.create(
        model="tiny", prompt="red lamp", max_tokens=12, temperature=0.7, seed=5, logprobs=3, echo=True
    ).choices[0]
    prompt = opened.tokenizer("red lamp")["input_ids"]
    response = next(
        ids
        for ids in [opened.tokenizer.convert_tokens_to_ids(tokens_of(opened, found.logprobs.tokens))]
        if ids[: len(prompt)] == prompt
    )
    with torch.no_grad():
        logits = opened.actor.transformer(torch.tensor([response])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(response[1:])[:, None]).squeeze(1).tolist()
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    highest = logits.topk(3).values.tolist()
    for row, top in zip(highest, found.logprobs.top_logprobs[1:], strict=True):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(row, abs=1e-5)
    scored = complete(address, prompt=[response], max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    assert scored["text"] == opened.tokenizer.decode(response) and scored["finish_reason"] == "length"


def tokens_of(opened, names: list[str]) -> list[str]:
    """Tokens as the vocabulary has them, from their texts or bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    written = bytes_to_unicode()
    encoded = [
        bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if name.startswith("bytes:") else name.encode()
        for name in names
    ]
    return ["".join(written[byte] for byte in token) for token in encoded]


def test_a_chats_log_probs_spell_its_text(client):
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=16, seed=2, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == answer.choices[0].message.content
    )
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob >= entry.logprob for entry in entries)


def test_streamed_pieces_join_to_the_whole(client):
    """Sampled bytes make characters of several tokens, and half ones; two choices at a time."""
    for seed in range(2):
        wanted = dict(model="tiny", messages=CHAT, max_tokens=48, seed=seed, n=2, temperature=1.3)
        whole = client.chat.completions.create(**wanted)
        texts, reasons = ["", ""], [None, None]
        chunks = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
        for chunk in chunks[:-1]:
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
        assert reasons == [choice.finish_reason for choice in whole.choices]
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


@pytest.mark.parametrize("running, tokens", [(1, 1), (32, 4), (64, 7), (128, 13)])
def test_pieces_come_at_once_and_then_less_often_the_more_streams_there_are(running, tokens, worker, monkeypatch):
    """So that many streams don't cost more than their tokens. Each piece has what came since the last one; a token
    comes every 64th of a second."""
    monkeypatch.setattr(worker, "running", set(range(running)))
    now = [0.0]
    monkeypatch.setattr("coati.serve.worker.time.monotonic", lambda: now[0])
    pieces = []
    wanted = Wanted("tiny", log_probs=True, stream=True)
    [stream] = worker.streams([5], wanted, pieces.append)
    ids = worker.encode("red blue lamp thank you. red blue lamp thank you", add_special_tokens=False)
    completion = Completion(ids=[], log_probs=[])
    emitted_at = []
    for id in ids:
        completion.ids.append(id)
        completion.log_probs.append(-1.0)
        before = len(pieces)
        assert stream.on_token(completion) == ""
        emitted_at += [now[0]] * (len(pieces) - before)
        now[0] += 1 / 64
    completion.ids.append(worker.tokenizer.eos_token_id)
    completion.finish_reason = "eos"
    assert stream.on_token(completion) == "eos"
    assert emitted_at == [tokens * i / 64 for i in range(len(emitted_at))] and len(emitted_at) > 1
    assert "".join(piece.text for piece in pieces) == worker.decode(ids)
    assert sum(len(piece.tokens) for piece in pieces) == len(ids)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    whole = []
    [stream] = worker.streams([5], replace(wanted, stream=False), whole.append)
    for count in range(1, len(completion.ids) + 1):
        stream.on_token(Completion(completion.ids[:count], [-1.0] * count, "eos" if count > len(ids) else ""))
    assert [piece.text for piece in whole] == [worker.decode(ids)]


def test_the_documented_script_prints_a_response(address, capsys):
    [script] = [block.text for block in blocks(ROOT / "docs" / "serving.md", "python")]
    documented = {"http://127.0.0.1:8000": address, '"ppo"': '"tiny"'}
    for text, real in documented.items():
        assert text in script
        script = script.replace(text, real)
    exec(compile(script, "docs/serving.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_stop_text_ends_a_response_and_is_no_part_of_it(client):
    wanted = dict(model="tiny", prompt="red lamp", max_tokens=48, seed=3)
    text = client.completions.create(**wanted).choices[0].text
    stop = text[10:14]
    found = client.completions.create(**wanted, stop=[stop, "never to be seen"]).choices[0]
    assert found.text == text[: text.index(stop)] and found.finish_reason == "stop"
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**wanted, stop=stop, stream=True)]
    assert "".join(pieces) == found.text


def test_a_conversation_is_written_by_the_template(client, opened):
    found = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, temperature=0)
    prompt = opened.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = opened.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == plain.choices[0].text
    assert found.usage.prompt_tokens == len(ids)


def test_64_streams_at_once_are_what_each_is_alone(address):
    """They come and go while others are in progress: each has its own length, temperature and nucleus."""

    def body(i):
        drawn = dict(temperature=(0, 1.0, 0.8)[i % 3], top_p=(1, 0.9)[i % 2], seed=i, max_tokens=3 + i % 9)
        return {"model": "tiny", "prompt": f"red {i}", "stream": True} | drawn

    async def text(client, i):
        lines = []
        async with client.stream("POST", f"{address}/v1/completions", json=body(i)) as answer:
            async for line in answer.aiter_lines():
                lines.append(line)
        return "".join(event["choices"][0]["text"] for event in events_of(lines))

    async def all_texts():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=PATIENCE, limits=limits, verify=False) as client:
            return await asyncio.gather(*(text(client, i) for i in range(64)))

    together = asyncio.run(all_texts())
    alone = [complete(address, **body(i) | {"stream": False})["choices"][0]["text"] for i in range(64)]
    assert together == alone and len(set(alone)) > 50


def test_a_nucleus_is_transformers_own():
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for mass in (0.05, 0.5, 0.9):
        expected = TopPLogitsWarper(mass)(None, scores)
        assert torch.equal(nucleus_of(scores, torch.full((6,), mass)), expected)
    tokens, log_probs = LiveSampler(torch.device("cpu"), [int(scores[0].argmax())])(
        scores, torch.arange(6), torch.zeros(6, dtype=torch.long), None, None
    )
    assert tokens[0] == scores[0].topk(2).indices[1] and torch.equal(tokens[1:], scores[1:].argmax(-1))
    assert torch.equal(log_probs, scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1))


# --- who is served, and who is not


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(address, monkeypatch, stream):
    """Its response ends at the next token: here the second one comes once the client has left."""
    has_begun, has_left, step = threading.Event(), threading.Event(), ContinuousBatch.step

    def step_after_that(batch):
        has_begun.set()
        assert has_left.wait(PATIENCE)
        step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", step_after_that)
    generated = metric(address, "coati_generated_tokens_total")
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 1000, "temperature": 0, "stream": stream}
    host, _, port = address.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        assert has_begun.wait(PATIENCE)  # it has its first token
        assert metric(address, "coati_requests_running") == metric(address, "coati_http_requests_open") == 1
    wait_until(lambda: metric(address, "coati_http_requests_open") == 0)
    has_left.set()
    wait_until(lambda: metric(address, "coati_requests_running") == 0)
    assert metric(address, "coati_generated_tokens_total") - generated == 2


def ask(app, *requests: tuple) -> list[httpx.Response]:
    """Answers to (method, path, keywords) at once, without a server."""

    async def answers():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=PATIENCE) as client:
            return await asyncio.gather(*(client.request(method, path, **more) for method, path, more in requests))

    return asyncio.run(answers())


def test_a_full_queue_refuses(opened):
    worker = Worker("tiny", opened, slots=2, max_queue=1, max_length=64)
    service = Service({"tiny": worker}, 2**20)
    body = {"model": "tiny", "prompt": "red", "max_tokens": 2, "seed": 0}
    refused = []

    async def fill():
        transport = httpx.ASGITransport(application(service, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=PATIENCE) as client:
            waiting = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(3)]
            while len(worker.waiting) < 3:  # two for the slots that are free, one more
                await asyncio.sleep(0)
            for more in ({}, {"stream": True}):
                refused.append(await client.post("/v1/completions", json=body | more))
            worker.thread.start()
            return [await one for one in waiting]

    taken = asyncio.run(fill())
    assert [answer.status_code for answer in taken] == [200] * 3
    for answer in refused:
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
    service.draining = True
    late, health = ask(application(service, None), ("POST", "/v1/completions", {"json": body}), ("GET", "/health", {}))
    assert (late.status_code, health.status_code, service.open) == (503, 503, 0)
    worker.close()
    worker.thread.join(PATIENCE)


def test_without_the_token_there_is_no_entry(worker):
    app = application(Service({"tiny": worker}, 2**20), "secret")
    paths = ("/v1/models", "/metrics", "/health", "/v1/chat/completions", "/")
    headers = (
        {},
        {"authorization": "Bearer secre"},
        {"authorization": "secret"},
        {"authorization": "Bearer sécret".encode()},
    )
    answers = ask(app, *[("GET", path, {"headers": header}) for path in paths for header in headers])
    assert {answer.status_code for answer in answers} == {401}
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    [answer] = ask(app, ("GET", "/v1/models", {"headers": {"authorization": "Bearer secret"}}))
    assert [model["id"] for model in answer.json()["data"]] == ["tiny"]


def test_wrong_requests_get_openais_errors(worker):
    app = application(Service({"tiny": worker}, 1000), None)

    async def without_length():
        for _ in range(3):
            yield b"[" * 400

    good = {"model": "tiny", "prompt": "red"}
    cases = [
        ({"json": good | {"prompt": "x" * 1000}}, 413, "body_too_long"),
        ({"content": without_length()}, 413, "body_too_long"),
        ({"content": b"{"}, 400, None),
        ({"content": b"[" * 900}, 400, None),
        ({"json": good | {"model": "other"}}, 404, "model_not_found"),
        ({"json": good | {"max_tokens": LONGEST}}, 400, "context_length_exceeded"),
        ({"json": good | {"prompt": [1, 99999]}}, 400, None),
        ({"json": good | {"prompt": ""}}, 400, None),
        ({"content": b'{"model": "tiny", "prompt": "\\ud800"}'}, 400, None),
        ({"json": good | {"prompt": ["red"] * 4, "n": 128}}, 400, None),
        ({"json": good | {"tint": 1}}, 400, "unknown_parameter"),
    ]
    answers = ask(app, *[("POST", "/v1/completions", more) for more, _, _ in cases])
    found = [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]
    assert found == [(status, code) for _, status, code in cases]
    wrong = ask(app, ("GET", "/v1/completions", {}), ("GET", "/v2", {}), ("GET", "/v1/models/other", {}))
    assert [answer.status_code for answer in wrong] == [404, 404, 404]
    [model, health] = ask(app, ("GET", "/v1/models/tiny", {}), ("GET", "/health", {}))
    assert model.json()["max_model_len"] == LONGEST and health.json() == {"status": "ok"}


def test_a_failure_is_an_error_and_the_next_request_is_served(opened, monkeypatch):
    worker = Worker("tiny", opened, slots=2, max_length=64)
    worker.start()
    app = application(Service({"tiny": worker}, 2**20), None)
    request = ("POST", "/v1/completions", {"json": {"model": "tiny", "prompt": "red", "max_tokens": 4}})

    def fail(*_):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "step", fail)
        [answer] = ask(app, request)
    assert answer.status_code == 500 and "out of something" in answer.json()["error"]["message"]
    [answer] = ask(app, request)
    assert answer.status_code == 200
    worker.close()
    worker.thread.join(PATIENCE)


# --- the command


def test_sigterm_finishes_what_was_begun(folder):
    """A stream in progress ends as it should, and the exit status is 0."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "coati.cli", "serve", f"tiny={folder}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            said = next(line for line in process.stdout if line.startswith("serving"))
            address = said.split()[-1].removesuffix("/v1")
            body = {"model": "tiny", "prompt": "red", "max_tokens": 400, "temperature": 0, "stream": True}
            with PLAIN.stream("POST", f"{address}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                wait_until(lambda: PLAIN.get(f"{address}/health").status_code == 503)
                assert post(address, "completions", prompt="red").status_code == 503
                events = events_of([first, *lines])
            assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_a_server_for_others_needs_a_token(folder, capsys, monkeypatch):
    monkeypatch.delenv("COATI_TOKEN", raising=False)
    for host in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        assert main(["serve", str(folder), "--host", host]) == 2
        assert "COATI_TOKEN" in capsys.readouterr().err
    server.check_address("0.0.0.0", "secret")
    for host in ("127.0.0.1", "localhost", "::1"):
        server.check_address(host, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "{folder}"], "two models are called"),
        (["a={folder}", "a={folder}"], "two models are called a"),
        (["/nowhere"], "/nowhere is no folder"),
        (["{empty}"], "in it: notes.txt"),
        (["{folder}", "--slots", "0"], "--slots 0 is below 1"),
        (["{folder}", "--port", "70000"], "can't listen on 127.0.0.1, port 70000"),
        (["{folder}", "--max_length", "4096", "--port", "0"], "more than the 2048 tokens"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    assert main(["serve", *(argument.format(folder=folder, empty=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_models_have_the_names_of_their_folders_or_ones_that_are_given(tmp_path):
    assert named_models(["runs/dpo", "base=models/b"]) == {"dpo": "runs/dpo", "base": "models/b"}
    assert named_models(["runs/a/model", "runs/b/model"]) == {n: n for n in ("runs/a/model", "runs/b/model")}
    (tmp_path / "lr=1").mkdir()
    assert named_models([str(tmp_path / "lr=1")]) == {"lr=1": str(tmp_path / "lr=1")}


def test_an_adapter_and_a_runs_checkpoint_are_opened(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from coati.run_layout import ACTOR, checkpoint_of_step, checkpoints_of, model_in, write_manifest

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    checkpoint = checkpoint_of_step(checkpoints_of(tmp_path / "run"), 10)
    adapted.save_pretrained(model_in(checkpoint, ACTOR))
    write_manifest(checkpoint, 10, None)
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted(ids).logits
    for path in (tmp_path / "run", checkpoint):
        found = open_model(model_folder(path), None, "cpu")
        assert found.base == folder and found.max_length == LONGEST
        torch.testing.assert_close(found.actor.model(ids).logits, expected)
    (checkpoint / "manifest.json").unlink()
    (model_in(checkpoint, ACTOR) / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="in it: checkpoints"):
        model_folder(tmp_path / "run")


@pytest.mark.slow
def test_lm_evals_local_completions_scores_and_generates(address, folder, opened):
    """Log-likelihoods by the API are those of the model; so is whether a text is the greedy one."""
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    api = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        num_concurrent=4,
        batch_size=2,
        max_length=256,
    )
    prompt = "red lamp"
    greedy = complete(address, prompt=prompt, max_tokens=3, temperature=0)["choices"][0]["text"]
    texts = [" blue", " thank you", " never"]
    requests = [Instance("loglikelihood", {}, (prompt, text), i) for i, text in enumerate(texts)]
    found = api.loglikelihood(requests)
    for text, (log_prob, _) in zip(texts, found, strict=True):
        start = opened.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = opened.tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = opened.actor.transformer(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[t - 1, ids[t]]) for t in range(len(start), len(ids)))
        assert log_prob == pytest.approx(expected, abs=1e-4)
    arguments = (prompt, {"until": ["\n"], "max_gen_toks": 3, "temperature": 0})
    [text] = api.generate_until([Instance("generate_until", {}, arguments, 0)])
    assert text == greedy
