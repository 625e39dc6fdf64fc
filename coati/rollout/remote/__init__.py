"""Generators: processes of their own that sample from a policy while other processes train it.

A generator runs the same script with the same settings as the trainer. It loads the policy once, and then, job after
job, the weights that a job names. What goes between them:

    weights.py      trainer -> disk -> generators: versions of the weights, a file each
    differences.py  what such a file holds if it isn't the whole weights
    client.py       trainer: asks for samples over HTTP, and asks another generator where one has gone
    server.py       generator: takes jobs, and does them one after the other
    journal.py      generators -> disk -> trainer: the samples of a job as one file, which a run that resumes finds
    address.py      how trainers find generators: a file each in a folder of the launcher's

A job is what one rank of a synchronous run would sample at once. What is computed together, and with which weights, is
a matter of the settings and not of time: so the samples are, to the last bit, whichever generator does the job.
"""

from coati.rollout.remote.address import Generators
from coati.rollout.remote.client import RemoteSampler
from coati.rollout.remote.differences import DifferenceWriter
from coati.rollout.remote.server import Service
from coati.rollout.remote.weights import WeightVersions, load_weights

__all__ = ["DifferenceWriter", "Generators", "RemoteSampler", "Service", "WeightVersions", "load_weights"]
