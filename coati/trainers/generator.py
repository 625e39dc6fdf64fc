"""A generator: the process that samples for a trainer with the same settings, see `coati.rollout.remote`."""

import contextlib
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from coati.config.plugin import PluginConfig
from coati.errors import UserError
from coati.models import Actor
from coati.models.base import disable_dropout
from coati.parallel import Runtime, launch
from coati.parallel.runtime import local_rank_in_slurm, rank_alone
from coati.rollout import Sampler
from coati.rollout.remote import Generators, Service, load_weights
from coati.rollout.remote.address import Address
from coati.rollout.remote.server import serve_in_thread
from coati.trainers.config import RolloutConfig, TrainerConfig
from coati.trainers.factory import Factory
from coati.variables import GENERATOR, GENERATOR_HOST

LOOPBACK = "127.0.0.1"


def check_generators(config: TrainerConfig):
    """Raises a UserError for what doesn't go with generators."""
    if not isinstance(config, RolloutConfig):
        raise UserError("generators are for methods that learn from their own responses, PPO, GRPO and their relatives")
    if config.model.path is None:
        raise UserError("generators load the policy that a run starts from: give --model FOLDER")


def generate(config: TrainerConfig):
    """Samples for the trainer until the launcher ends this process.

    Raises:
        UserError: settings that don't go with generators, or that the policy can't be loaded with.
    """
    check_generators(config)
    generators, number = Generators.from_environment(), int(os.environ[GENERATOR])
    if generators is None:
        raise UserError(f"{GENERATOR} is set, but not how generators are found: start them with coati run --generators")
    os.environ |= rank_alone(local_rank_in_slurm())  # whatever has started several of them
    runtime = launch(config.seed)
    # those that train need samples to come to a step's end, and what ends them ends us
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)
    with contextlib.redirect_stdout(None):  # the trainer says the same
        service = Service(*sampler_and_weights(config, runtime), number)
    host, token = os.environ.get(GENERATOR_HOST, LOOPBACK), secrets.token_urlsafe(32)
    port = serve_in_thread(service, host, token)
    generators.announce(number, Address(f"http://{host}:{port}", token))
    service.run()


def sampler_and_weights(config: RolloutConfig, runtime: Runtime) -> tuple[Sampler, Callable[[Path, str, str], None]]:
    """What samples on this process, and what gives its policy the weights of a file (`load_weights`)."""
    # unsharded, whatever the trainer's plugin
    parallel = PluginConfig(precision=config.parallel.precision, device=config.parallel.device)
    config = replace(config, parallel=parallel)
    factory = Factory(config, runtime, learns_responses=False)
    factory.longest_sequence = config.longest_row
    policy = factory.model(Actor, config.model.path, lora=config.model.lora)
    disable_dropout(policy)
    generator = factory.generator(factory.frozen(policy), config.generation)
    return factory.sampler(generator, policy), partial(load_weights, policy)
