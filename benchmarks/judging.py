"""How much of a judge's time is hidden behind generation: how long an iteration waits for verdicts once its last
response has ended, as training logs it (`seconds/reward_wait`).

    python benchmarks/judging.py               # eight minutes on two cores; one JSON line
    python benchmarks/judging.py --save        # and writes benchmarks/results/judging.json

256 responses are generated, 64 of them at a time, by the model of generation.py. The judge is a process of its own that
gives a verdict after some seconds, drawn log-normally; 16 requests wait at a time. A case is the median of the seconds,
and the tokens after which a response ends or so (four times as many at most). Of each:

- `generate`: seconds of generation, while verdicts are asked for.
- `wait`: from the end of the last response to the last verdict.
- `alone`: how long the same requests take afterwards, with nothing generated meanwhile.
- `late`: what no generation of the same responses can hide: a verdict that is asked for when its response ends takes
  its time after that.
- `hidden`: the share of `alone` that isn't waited for. If `alone` is longer than `generate`, that can't be all of it.
"""

import argparse
import asyncio
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import machine, store
from benchmarks.serve import write_model

RESPONSES, CONCURRENCY = 256, 16
SIGMA = 0.5  # of the logarithm of a verdict's seconds
CASES = ("0.3:192", "1:192", "3:192", "3:384")


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


class TimedSampler:
    """A sampler that notes when each sample ended.

    Attributes:
        ended: by the prompts' places.
    """

    plays_episodes = False

    def __init__(self, sampler):
        self.sampler = sampler
        self.ended: dict[int, float] = {}

    def sample(self, prompts, sampling, version=0, on_sample=None):
        def note(i, sample):
            self.ended[i] = time.monotonic()
            on_sample(i, sample)

        return self.sampler.sample(prompts, sampling, version, note)


def measure(opened, endpoint: str, median: float, responses: int, mean: int) -> dict[str, float]:
    """Seconds of one iteration and of its verdicts alone, by name."""
    from coati.rewards.config import JudgeRewardSettings, ScoringConfig, load_rewards
    from coati.rollout import GenerationConfig, PolicyGenerator, Prompt, ResponseSampler, ScoredGeneration

    ends = list(range(0, len(opened.tokenizer), mean))  # about one token of so many ends a response
    opened.actor.transformer.generation_config.eos_token_id = ends
    generator = PolicyGenerator.of_actor(opened.actor, opened.tokenizer)
    sampler = TimedSampler(ResponseSampler(generator, opened.tokenizer, ends))
    scorer = load_rewards([JudgeRewardSettings(model="m", endpoint=endpoint, concurrency=CONCURRENCY)], ScoringConfig())
    prompts = [Prompt(i, [i], [3 + i, 4, 5], f"question {i}", {}) for i in range(responses)]
    found = ScoredGeneration(sampler, scorer).sample(prompts, GenerationConfig(max_new_tokens=4 * mean))

    alone = scorer.score(found.samples)["judge"]  # no verdict is kept, so all are asked for again
    reward, _ = scorer.rewards["judge"]
    ended = max(sampler.ended.values())
    arrivals = []
    for i, sample in enumerate(found.samples):
        [question] = reward.questions(sample)
        arrivals.append(sampler.ended[i] + seconds_of(question.messages[-1]["content"], median))
    return {
        "generate": found.seconds["generate"],
        "wait": found.seconds["reward_wait"],
        "alone": alone,
        "late": max(arrivals) - ended,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0].replace("\n", " "))
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="seconds of a verdict:tokens of a response")
    parser.add_argument("--responses", type=int, default=RESPONSES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/judging.json")
    options = parser.parse_args()

    import torch

    from coati.models.opened import open_model

    torch.set_num_threads(options.threads)
    result = {"machine": machine(options.threads), "responses": options.responses}
    result |= {"concurrency": CONCURRENCY, "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, {})
        opened = open_model(Path(folder), None, "cpu")
        for case in options.cases:
            median, mean = case.split(":")
            with judging(float(median)) as endpoint:
                seconds = measure(opened, endpoint, float(median), options.responses, int(mean))
            hidden = 1 - seconds["wait"] / seconds["alone"]
            result["cases"][case] = {"seconds": seconds, "hidden": hidden}
            print(case, seconds, hidden, file=sys.stderr, flush=True)
            if options.save:
                store(result, "judging", "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
