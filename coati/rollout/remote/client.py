"""The trainer's side: samples that generators make."""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import xxhash

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rollout.generator import notify_done
from coati.rollout.remote.address import Generators
from coati.rollout.remote.journal import job_file, read_samples
from coati.rollout.remote.server import Job, Progress
from coati.rollout.remote.weights import WeightVersions
from coati.rollout.sampler import OnSample, Prompt, Sampled

logger = logging.getLogger(__name__)

SECONDS_TO_WAIT = 10.0  # for a job, in one request
SECONDS_TO_ANSWER = 60.0  # beyond that
SECONDS_BETWEEN_TRIES = 0.2
SECONDS_UNTIL_SAID = 60.0  # that no generator is there


class GeneratorLost(Exception):
    """A generator doesn't answer, or has forgotten a job: it is gone, or was started again."""


class RemoteSampler:
    """A `Sampler` whose samples come from generators, or from the journal if they are there.

    Args:
        versions: the weights that can be sampled with; those of a job must be published before it is asked for.
        journal: folder of the samples, on a disk that the generators see.
        plays_episodes: whether the generators do.
        settings: what else tells jobs apart: of their environment, how many heads samples have, and whether experts.
        rank, world_size: of this process among those that ask, so that they ask different generators.
    """

    def __init__(
        self,
        generators: Generators,
        versions: WeightVersions,
        journal: Path,
        *,
        plays_episodes: bool,
        settings: dict[str, Any],
        rank: int,
        world_size: int,
    ):
        self.generators, self.versions, self.journal = generators, versions, journal
        self.plays_episodes, self.settings = plays_episodes, settings
        # those of other ranks begin with other generators
        self.places = itertools.count(rank, world_size)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        version: int = 0,
        on_sample: OnSample | None = None,
    ) -> Sampled:
        """See `Sampler`; `on_sample` is called when all have ended.

        Raises:
            UserError: the generator has met one.
            RuntimeError: the job fails on a generator.
        """
        sampled = self.finished_job(prompts, sampling, version)
        notify_done(sampled.samples, on_sample)
        return sampled

    def finished_job(self, prompts: Sequence[Prompt], sampling: GenerationConfig, version: int) -> Sampled:
        """The samples of a job that is done, if need be now; `generate` is how long its generator took."""
        # an environment begins from the columns; a single response has no use for them
        sent = [prompt if self.plays_episodes else replace(prompt, columns={}) for prompt in prompts]
        checksum = self.versions.checksums[version]
        id = self.id_of(sent, sampling, checksum)
        file = job_file(self.journal, version, id)
        if (found := read_samples(file, prompts)) is None:
            job = Job.of(id, version, self.versions.path(version), checksum, sampling, sent, file)
            self.have_done(job, next(self.places))
            found = read_samples(file, prompts)
        if found is None:
            raise RuntimeError(f"{file} can't be read, although a generator has written it: is the disk shared?")
        header, samples = found
        return Sampled(samples, header["seconds"])

    def id_of(self, prompts: Sequence[Prompt], sampling: GenerationConfig, checksum: str) -> str:
        """The same for jobs that give the same samples."""
        rows = [[prompt.row, list(prompt.seed), prompt.input_ids, prompt.columns] for prompt in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt.max_new_tokens is not None:
                row += [prompt.begun, prompt.max_new_tokens]
        told = {"weights": checksum, "sampling": asdict(sampling), "settings": self.settings, "prompts": rows}
        try:
            return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())
        except TypeError as error:
            raise UserError(f"rows for an environment in another process must hold what JSON can: {error}") from None

    def have_done(self, job: Job, place: int):
        """Has a generator do a job, and another one if that is lost.

        Args:
            place: which generator is asked first.
        """
        since = time.monotonic()
        while True:
            number = place % self.generators.count
            try:
                progress = self.ask(number, job)
                break
            except GeneratorLost as lost:
                if time.monotonic() - since > SECONDS_UNTIL_SAID:
                    logger.warning(f"waiting for a generator: {number} {lost}")
                    since = time.monotonic()
            place += 1
            time.sleep(SECONDS_BETWEEN_TRIES)
        if progress.is_users:
            raise UserError(progress.error)
        if progress.state == "failed":
            raise RuntimeError(f"generator {number} failed:\n{progress.error}")

    def ask(self, number: int, job: Job) -> Progress:
        """Has one generator do a job, and waits.

        Raises:
            GeneratorLost: it isn't there, or no longer.
        """
        address = self.generators.find(number)
        if address is None:
            raise GeneratorLost("is not ready")
        headers = {"Authorization": f"Bearer {address.token}"}
        patience = SECONDS_TO_WAIT + SECONDS_TO_ANSWER
        try:
            with httpx.Client(base_url=address.url, headers=headers, timeout=patience, trust_env=False) as client:
                client.post("/jobs", content=json.dumps(asdict(job))).raise_for_status()
                while True:
                    answer = client.get(f"/jobs/{job.id}", params={"seconds": SECONDS_TO_WAIT})
                    progress = Progress(**answer.raise_for_status().json())
                    if progress.state in ("done", "failed"):
                        return progress
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 404):  # started again, with another token and no jobs
                raise GeneratorLost("was started again") from error
            raise
        except httpx.TransportError as error:
            raise GeneratorLost(f"does not answer ({error})") from error
