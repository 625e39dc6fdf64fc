"""Trains with delays of random length planted everywhere, and notes what generators sample.

    python tests/distributed/delayed.py grpo --config FILE.yaml

DELAYS is the longest delay in seconds; JOBS a file that gets a line for each job that was sampled and written.
"""

import os
import random
import sys
import time

from coati.commands import train
from coati.rollout.remote import client, server, weights

LONGEST, JOBS = float(os.environ.get("DELAYS", "0")), os.environ.get("JOBS")


def delayed(function):
    """The function with a delay before and after it."""

    def call(*arguments, **options):
        time.sleep(random.SystemRandom().uniform(0, LONGEST))
        result = function(*arguments, **options)
        time.sleep(random.SystemRandom().uniform(0, LONGEST))
        return result

    return call


def noted(write):
    """Writing samples, with a line in JOBS once they are written."""

    def call(path, *arguments):
        write(path, *arguments)
        with open(JOBS, "a") as file:
            file.write(f"{path.name}\n")

    return call


if __name__ == "__main__":
    if JOBS:
        server.write_samples = noted(server.write_samples)
    if LONGEST:
        server.Service.do = delayed(server.Service.do)
        server.write_samples = delayed(server.write_samples)
        client.RemoteSampler.ask = delayed(client.RemoteSampler.ask)
        weights.WeightVersions.publish = delayed(weights.WeightVersions.publish)
        weights.write_weights = delayed(weights.write_weights)
    train(sys.argv.pop(1))
