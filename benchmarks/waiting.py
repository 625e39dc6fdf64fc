"""Episodes whose environments take 50 ms: turns that join others on their way, and turns that begin together.

    python benchmarks/waiting.py              # minutes on two idle cores; one JSON line
    python benchmarks/waiting.py --save       # and writes benchmarks/results/waiting.json and docs/waiting.svg

256 episodes begin with 64 tokens; in each of 4 turns they sample 16 on average, 64 at most, and read 16 new ones, after
an environment that sleeps asynchronously. A case is how many rows respond together, of the model of generation.py or of
a small one, for which 50 ms are many steps. Rates are sampled tokens a second; `busy` is the share of the time in which
generation doesn't stand still for an environment, `busy or nothing to do` that in which it doesn't do so while another
episode could go on.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import Contender, contest, machine, ratio, serve, store
from benchmarks.generation import make_model

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "waiting.svg"
EPISODES, TURNS, BEGINNING, NEW, SECONDS = 256, 4, 64, 16, 0.05
MEAN, LONGEST = 16, 64  # tokens of a response
SMALL = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=2)
CASES = {"64": {}, "256": {}, "64-small": SMALL, "256-small": SMALL}  # the models
CONTENDERS = {"turns that join": True, "turns together": False}


class Episodes:
    """Environments that answer after a while with tokens that are fixed beforehand.

    Attributes:
        waited: seconds for which generation stood still; idle: those when another episode could have gone on.
        batches: whose rows may be in the middle of a response.
    """

    def __init__(self, count: int, batches: list):
        from coati.rollout import Request
        from coati.rollout.environment import EnvironmentCalls

        random = np.random.default_rng(1)
        self.new = random.integers(3, 1000, (count, TURNS, NEW)).tolist()
        beginnings = random.integers(3, 1000, (count, BEGINNING)).tolist()
        self.requests = [Request(tokens, [i, 0], keep_states=True) for i, tokens in enumerate(beginnings)]
        self.calls, self.answers, self.batches = EnvironmentCalls(60.0), {}, batches
        self.waited = self.idle = 0.0

    def hear(self, number: int, completion):
        async def answer():
            await asyncio.sleep(SECONDS)
            return completion

        self.answers[number] = self.calls.begin(answer)

    def next(self, number: int):
        from coati.rollout import Request

        started, call = time.perf_counter(), self.answers.pop(number)
        others = bool(self.batches[-1].rows) or any(answer.future.done() for answer in self.answers.values())
        completion = self.calls.result(call)
        seconds = time.perf_counter() - started
        self.waited += seconds
        self.idle += seconds * others
        request = self.requests[number]
        i, turn = request.seed
        if turn + 1 == TURNS:
            return None
        states, completion.states = completion.states, None
        tokens = [*request.prompt, *completion.ids, *self.new[i][turn]]
        self.requests.append(Request(tokens, [i, turn + 1], states=states, keep_states=turn + 2 < TURNS))
        return self.requests[-1]


def ends(responses: list[list[int]]) -> list[bool]:
    """By the last token: the model has random weights, and samples all about equally often."""
    return [ids[-1] % MEAN == 0 for ids in responses]


def prepare(settings: dict):
    from coati.models import Actor
    from coati.rollout import FollowUps, GenerationConfig, RolloutEngine
    from coati.rollout.engine.batch import ContinuousBatch
    from coati.rollout.generator import in_rounds

    class WatchedBatch(ContinuousBatch):
        def __init__(self, *arguments, **options):
            batches.append(self)
            super().__init__(*arguments, **options)

        def step(self):
            rows_by_time.append((time.perf_counter() - started, len(self.rows)))
            super().step()

    class Watched(RolloutEngine):
        batch_class = WatchedBatch

    actor = Actor(make_model(settings))
    started, rows_by_time, batches = 0.0, [], []

    def work() -> dict:
        nonlocal started
        engine = Watched(
            actor, GenerationConfig(max_new_tokens=LONGEST), eos_ids=[], stop=ends, slots=settings["slots"]
        )
        episodes = Episodes(settings["episodes"], batches)
        follow_ups = FollowUps(episodes.next, BEGINNING + TURNS * (LONGEST + NEW))
        started = time.perf_counter()
        rows_by_time.clear()
        batches.clear()
        asked = episodes.requests[:], episodes.hear, follow_ups
        found = engine.generate(*asked) if settings["joins"] else in_rounds(engine.generate, *asked)
        seconds = time.perf_counter() - started
        return {
            "amount": sum(len(completion.ids) for completion in found),
            "parts": {
                "busy": 1 - episodes.waited / seconds,
                "busy or nothing to do": 1 - episodes.idle / seconds,
                "waited": episodes.waited,
                "idle": episodes.idle,
            },
            "rows_by_time": rows_by_time[:],
        }

    return work


def run_case(settings: dict, rounds: int, threads: int) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "worker"]
    contenders = [Contender(name, command, settings | {"joins": joins}) for name, joins in CONTENDERS.items()]
    found = contest(contenders, rounds=rounds, threads=threads)
    return {"contenders": found, "ratio": ratio(*(found[name] for name in CONTENDERS))}


def draw(settings: dict):
    """The rows that respond, over the seconds."""
    from coati.tracking.charts import Line
    from examples.drawing import figure

    lines = []
    for color, joins in enumerate(CONTENDERS.values()):
        found = prepare(settings | {"joins": joins})()["rows_by_time"]
        points = []
        for (seconds, rows), (until, _) in pairwise(found):
            points.append((seconds, rows))
            if until - seconds > 2 * SECONDS and rows < 5:  # the last step of a turn, and it stood still
                points += [(seconds + 0.01, 0), (until - 0.01, 0)]
        lines.append(Line(list(CONTENDERS)[color], color, points))
    drawn = figure({"rows that respond": lines}, list(CONTENDERS))
    FIGURE.write_text(drawn.replace(">step<", ">seconds<"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=json.loads, default={}, help="JSON that changes the model")
    parser.add_argument("--save", action="store_true", help="write results/waiting.json and docs/waiting.svg")
    options = parser.parse_args()
    result = {"machine": machine(options.threads), "rounds": options.rounds, "cases": {}}
    for case in options.cases:
        load, model = os.getloadavg()[0], CASES[case] | options.model
        settings = {"model": model, "episodes": options.episodes, "slots": int(case.split("-")[0])}
        found = run_case(settings, options.rounds, options.threads)
        result["cases"][case] = found | {"load_before": load}
        print(case, "done", file=sys.stderr, flush=True)
        if options.save:
            store(result, "waiting", "cases")
    if options.save:
        draw(settings)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        serve(prepare)
    else:
        main()
