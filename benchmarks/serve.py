"""`coati serve`: 64 streams by HTTP beside the same requests given to the engine at once.

    python benchmarks/serve.py               # a few minutes on idle cores; one JSON line
    python benchmarks/serve.py --save        # and writes benchmarks/results/serve.json
    python benchmarks/serve.py --streams 8 --new 32 --rounds 1

The server is a process of its own; the client runs on the same machine, and reads bytes only, so that it takes little
of the cores. Prompts have 32 tokens, responses exactly `--new`. The model is a random Llama of 5.8 M parameters
(`generation.py`). Time to first token is from sending a request to the first piece of text, of streams that
all begin at once: the last ones wait until the prompts of all are read.
"""

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import machine, store
from benchmarks.generation import MODEL, make_model, prompts


def write_model(folder: str, model: dict):
    """A model without an EOS that it would sample, and a tokenizer with a token for each of its rows."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    size = (MODEL | model)["vocab_size"]
    vocabulary = {f"<{i}>": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    llama = make_model({"model": model})
    llama.generation_config.suppress_tokens = [1]
    llama.generation_config.eos_token_id = 1
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>").save_pretrained(folder)


def by_engine(folder: str, streams: int, new: int) -> float:
    """Tokens per second of the engine alone, all requests at once."""
    import torch

    from coati.models import Actor
    from coati.rollout import GenerationConfig, Request, RolloutEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = RolloutEngine(
        Actor(folder).eval().to(device), GenerationConfig(max_new_tokens=new), eos_ids=[], slots=streams
    )
    requests = [Request(prompt, i) for i, prompt in enumerate(prompts(streams))]
    started = time.perf_counter()
    engine.generate(requests)
    return streams * new / (time.perf_counter() - started)


def by_server(address: str, streams: int, new: int) -> tuple[float, list[float]]:
    """Tokens per second of all streams, and the seconds to the first token of each."""
    url = urlsplit(f"{address}/completions")
    connections = [socket.create_connection((url.hostname, url.port)) for _ in range(streams)]
    selector = selectors.DefaultSelector()
    started = time.perf_counter()
    for seed, (connection, prompt) in enumerate(zip(connections, prompts(streams), strict=True)):
        body = {"model": "model", "prompt": prompt, "max_tokens": new, "seed": seed, "stream": True}
        content = json.dumps(body).encode()
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, bytearray())
    first, answers = [], []
    while selector.get_map():
        for key, _ in selector.select():
            read, new_bytes = key.data, key.fileobj.recv(2**16)
            if b"data: " not in read and b"data: " in read + new_bytes:
                first.append(time.perf_counter() - started)
            read += new_bytes
            if not new_bytes or b"[DONE]" in read[-40:]:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                answers.append(read.decode())
    rate = streams * new / (time.perf_counter() - started)
    for answer in answers:
        check_answer(answer, new)
    return rate, first


def check_answer(answer: str, new: int):
    """Raises a RuntimeError unless it is a stream of `new` tokens: each is one word."""
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
    if text.count("<") != new:
        raise RuntimeError(f"the server's answer is not a whole stream of {new} tokens: {answer[:500]}")


def measure(options: argparse.Namespace) -> dict:
    """Rates of the engine and the server in turns, after one to warm up."""
    engine, server, first = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, options.model)
        command = [sys.executable, "-m", "coati.cli", "serve", f"model={folder}", "--port", "0"]
        command += ["--slots", str(options.streams), "--max_length", str(options.new + 64)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                said = next(line for line in process.stdout if line.startswith("serving"))
                address = said.split()[-1]
                for _ in range(options.rounds + 1):
                    engine.append(by_engine(folder, options.streams, options.new))
                    rate, seconds = by_server(address, options.streams, options.new)
                    server.append(rate)
                    first.append(seconds)
            finally:
                process.terminate()
    waits = sorted(seconds for turn in first[1:] for seconds in turn)
    return {
        "tokens_per_second": {"engine": statistics.median(engine[1:]), "server": statistics.median(server[1:])},
        "ratio": statistics.median(s / e for s, e in zip(server[1:], engine[1:], strict=True)),
        "seconds_to_first_token": {"median": statistics.median(waits), "p95": waits[int(0.95 * (len(waits) - 1))]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", type=json.loads, default={}, help="fields of LlamaConfig, as JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serve.json")
    options = parser.parse_args()
    import torch

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    case = {f"{options.streams}-{options.new}": measure(options)}
    settings = {"model": MODEL | options.model, "rounds": options.rounds}
    found = {"machine": machine(options.threads), **settings, "cases": case}
    if options.save:
        store(found, "serve", "cases")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
