"""`coati serve --engine vllm`: what vLLM's server is told, and, where vLLM is, what it answers. `make test-vllm` runs
this file there."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

from coati.cli import main
from coati.config import generation
from coati.listening import listen
from coati.models import Actor
from coati.models.lora import LoraSettings
from coati.models.opened import open_model
from coati.serve import vllm
from tests.conftest import ROOT

PATIENCE = 600  # seconds: vLLM is slow to start on a CPU


@pytest.fixture(scope="module")
def folder(tiny_world, tmp_path_factory):
    """A model with heads of a size that vLLM knows."""
    place = tmp_path_factory.mktemp("served") / "tiny"
    config = LlamaConfig.from_pretrained(tiny_world["policy"], hidden_size=64, num_attention_heads=2, head_dim=32)
    config.num_key_value_heads, config.max_position_embeddings = 1, 128
    torch.manual_seed(1)
    Actor(config=config).save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_world["policy"]).save_pretrained(place)
    return place


@pytest.fixture
def told(monkeypatch):
    """What would be started: the words and the variables of the new process."""
    found = []

    class Started(Exception):
        """This process would have become the other one."""

    def execvpe(*arguments):
        found.append(arguments)
        raise Started

    monkeypatch.setattr(vllm.os, "execvpe", execvpe)
    monkeypatch.setattr(generation, "find_spec", lambda name: name)

    def serve(*words) -> tuple[list[str], dict[str, str]]:
        with pytest.raises(Started):
            main(["serve", *map(str, words), "--engine", "vllm"])
        [(program, command, variables)] = found
        assert program == command[0] == sys.executable
        return command[1:], variables

    return serve


def test_the_server_is_told_the_model_and_the_limits(told, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words, variables = told(f"tiny={folder}", "--token", "secret", "--slots", 8, "--max_length", 64, "--port", 8001)
    start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"]
    limits = ["--host", "127.0.0.1", "--port", "8001", "--dtype", "float32", "--max-num-seqs", "8"]
    assert words == [*start, *limits, "--max-model-len", "64"]
    assert variables[vllm.KEY] == "secret" and "secret" not in words


def test_an_adapter_is_served_beside_its_base(told, folder, tmp_path):
    Actor(str(folder), lora=LoraSettings(rank=12)).save_pretrained(tmp_path / "adapter")
    words, _ = told(tmp_path / "adapter")
    start = words.index("--model") + 1
    assert words[start : start + 3] == [str(folder), "--served-model-name", "adapter-base"]
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"adapter={tmp_path / 'adapter'}"]
    assert words[start + 3 : start + 3 + len(lora)] == lora


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a={folder}", "b={folder}"], "serves one model, not 2"),
        (["{folder}", "--port", "0"], "--port other than 0"),
        (["{folder}", "--max_queue", "8"], "--max_queue is for --engine coati"),
        (["{folder}", "--max_body", "8"], "--max_body is for --engine coati"),
        (["{folder}", "--host", "0.0.0.0"], "COATI_TOKEN"),
        (["/nowhere"], "/nowhere is no folder"),
    ],
)
def test_what_it_can_not_do_is_one_sentence(words, says, folder, monkeypatch, capsys):
    monkeypatch.setattr(generation, "find_spec", lambda name: name)
    monkeypatch.delenv("COATI_TOKEN", raising=False)
    assert main(["serve", *(word.format(folder=folder) for word in words), "--engine", "vllm"]) == 2
    assert says in capsys.readouterr().err


def test_a_missing_vllm_is_named_with_its_remedy(folder, monkeypatch, capsys):
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    assert main(["serve", str(folder), "--engine", "vllm"]) == 2
    assert "`make test-vllm`" in capsys.readouterr().err


def test_vllm_answers_as_the_engine_would(folder):
    """Greedy, with the key that it was told."""
    pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm`")
    with listen("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "coati.cli", "serve", f"tiny={folder}", "--engine", "vllm", "--port", port]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "COATI_TOKEN": "secret", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer secret"}
    body = {"model": "tiny", "prompt": "red lamp", "max_tokens": 12, "temperature": 0}
    with subprocess.Popen([*command, "--slots", "4", "--max_length", "128"], env=variables, cwd=ROOT) as process:
        try:
            wait_for(f"{url}/health", process)
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).status_code == 401
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=PATIENCE)
            [model] = httpx.get(f"{url}/v1/models", headers=headers, timeout=PATIENCE).json()["data"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    assert model["id"] == "tiny" and model["max_model_len"] == 128
    opened = open_model(folder, torch.float32, "cpu")
    ids = opened.tokenizer("red lamp", return_tensors="pt")["input_ids"]
    expected = opened.actor.transformer.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=2)
    text = opened.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.json()["choices"][0]["text"] == text.rstrip("\ufffd")  # half a character at the end is left out


def wait_for(url: str, process: subprocess.Popen):
    give_up = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < give_up
        try:
            if httpx.get(url, timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
