"""How much of a judge's time is hidden behind generation: responses scored by a judge that takes a while, and by a
function that takes none.

    python benchmarks/judging.py               # minutes on two idle cores; one JSON line
    python benchmarks/judging.py --save        # and writes benchmarks/results/judging.json

256 responses end after 64 tokens on average, 256 at most; the model is that of generation.py. The judge is a process of
its own that gives a verdict after some seconds, drawn log-normally; of each case that is their median. 16 requests wait
at a time. `alone` is how long the verdicts would take after generation, as long as 256 of the mean, 16 at a time;
`hidden` is the share of it that the whole does not take longer than with the function.
"""

import argparse
import asyncio
import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import Contender, contest, machine, serve, store
from benchmarks.serve import write_model

RESPONSES, MEAN, LONGEST, CONCURRENCY = 256, 64, 256, 16
SIGMA = 0.5  # of the logarithm of a verdict's seconds
MEDIANS = (0.1, 0.3, 1.0)  # seconds


def seconds_of(text: str, median: float) -> float:
    """How long a verdict takes: log-normal, the same for the same question."""
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return median * math.exp(SIGMA * statistics.NormalDist().inv_cdf(min(max(number, 1e-6), 1 - 1e-6)))


def run_judge(median: float, ports):
    """An endpoint that takes its time; says which port it has."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def reply(request):
        text = (await request.json())["messages"][-1]["content"]
        await asyncio.sleep(seconds_of(text, median))
        message = {"role": "assistant", "content": "Score: 5"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return JSONResponse({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    application = Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning"))

    async def run():
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ports.put(server.servers[0].sockets[0].getsockname()[1])
        await serving

    asyncio.run(run())


@contextmanager
def judging(median: float):
    """The URL of such a judge, for the block."""
    context = get_context("spawn")
    ports = context.Queue()
    process = context.Process(target=run_judge, args=(median, ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=120)}/v1"
    finally:
        process.terminate()
        process.join()


def nothing(prompts, responses, **columns) -> list[float]:
    return [0.0] * len(responses)


def prepare(settings: dict) -> Callable[[], dict]:
    from coati.models.opened import open_model
    from coati.rewards.config import JudgeRewardSettings, ScoringConfig, load_rewards
    from coati.rewards.function import FunctionReward
    from coati.rollout import GenerationConfig, PolicyGenerator, Prompt, ResponseSampler, ScoredGeneration

    opened = open_model(Path(settings["folder"]), None, "cpu")
    tokenizer, count = opened.tokenizer, settings["responses"]
    ends = list(range(0, len(tokenizer), MEAN))  # about one token of so many ends a response
    generator = PolicyGenerator.of_actor(opened.actor, tokenizer)
    if settings["endpoint"] is None:
        scorer = load_rewards([], ScoringConfig(), given=[FunctionReward(nothing)])
    else:
        entry = JudgeRewardSettings(model="m", endpoint=settings["endpoint"], concurrency=CONCURRENCY)
        scorer = load_rewards([entry], ScoringConfig())
    calls = 0

    def work() -> dict:
        nonlocal calls
        calls += 1  # other questions each time
        prompts = [Prompt(i, [calls, i], [3 + i, 4, 5], f"question {calls} {i}", {}) for i in range(count)]
        generation = ScoredGeneration(ResponseSampler(generator, tokenizer, ends), scorer)
        found = generation.sample(prompts, GenerationConfig(max_new_tokens=LONGEST, generation_batch_size=64))
        return {"amount": count, "parts": {f"seconds, {name}": value for name, value in found.seconds.items()}}

    return work


def run_case(median: float, folder: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "worker"]
    settings = {"folder": folder, "responses": options.responses}
    with judging(median) as endpoint:
        contenders = [
            Contender("function", command, settings | {"endpoint": None}),
            Contender("judge", command, settings | {"endpoint": endpoint}),
        ]
        found = contest(contenders, rounds=options.rounds, threads=options.threads)
    seconds = {name: options.responses / other["rate"] for name, other in found.items()}
    alone = options.responses * median * math.exp(SIGMA**2 / 2) / CONCURRENCY
    longer = seconds["judge"] - seconds["function"]
    return {"contenders": found, "seconds": seconds | {"alone": alone}, "hidden": 1 - longer / alone}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].replace("\n", " "))
    parser.add_argument("--medians", type=float, nargs="+", default=list(MEDIANS), help="seconds of a verdict")
    parser.add_argument("--responses", type=int, default=RESPONSES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/judging.json")
    options = parser.parse_args()
    result = {"machine": machine(options.threads), "rounds": options.rounds, "responses": options.responses}
    result |= {"concurrency": CONCURRENCY, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, {})
        for median in options.medians:
            result["cases"][f"{median:g}"] = run_case(median, folder, options)
            if options.save:
                store(result, "judging", "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        serve(prepare)
    else:
        main()
