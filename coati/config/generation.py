"""How responses are drawn."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

from coati.config.options import ListOf, Settings, option, settings
from coati.errors import UserError


@settings
class GenerationConfig(Settings):
    """How responses are drawn."""

    max_new_tokens: int = option(128, "longest response, in tokens", ge=1, common=True)
    min_new_tokens: int = option(0, "shortest response, in tokens", ge=0)
    temperature: float = option(1.0, "of sampling; 0 for greedy", ge=0, common=True)
    top_k: int = option(0, "sample from the k most probable tokens only; 0 for all", ge=0)
    top_p: float = option(1.0, "nucleus mass: sample from the fewest tokens that hold this probability", gt=0, le=1)
    min_p: float = option(0.0, "leave out tokens less probable than this fraction of the most probable one", ge=0, le=1)
    repetition_penalty: float = option(1.0, "makes tokens that are there already less likely; 1 for none", gt=0)
    stop: ListOf[str] = option((), "texts that end a response, beside EOS")
    compile_generation: bool = option(
        False,
        "torch.compile the decoding step: a minute at the start (on a CPU with g++ only), then small models are 1.3 "
        "times as fast; larger ones, with layers of 100,000 weights, are slower on a CPU",
    )
    num_beams: int = option(1, "beam search with that many beams instead of sampling", ge=1)
    generation_batch_size: int = option(64, "responses generated together on one process", ge=1)
    rollout_engine: Literal["coati", "vllm"] = option(
        "coati", "what generates: coati's own engine, or vLLM (docs/ppo.md)"
    )
    vllm_cache: float | None = option(None, "vLLM's KV-cache memory, GiB per process: 8 on a GPU, 1 on a CPU", gt=0)

    @property
    def draws_from_all(self) -> bool:
        """Whether tokens are drawn from the model's own distribution at the temperature."""
        changed = self.repetition_penalty != 1 or self.min_new_tokens > 0
        return not (self.top_k or self.top_p < 1 or self.min_p or changed)

    def at_temperature(self, temperature: float) -> "GenerationConfig":
        """The same but for the temperature. At 0 it makes no difference which tokens are drawn from."""
        if temperature == 0:
            return replace(self, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        return replace(self, temperature=temperature)

    def problems(self) -> Iterator[str]:
        if self.temperature == 0 and self.num_beams == 1 and (self.top_k or self.top_p < 1 or self.min_p):
            yield "temperature 0 is greedy: leave out top_k, top_p and min_p, or raise the temperature"
        if self.min_new_tokens > self.max_new_tokens:
            yield f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
        if self.rollout_engine == "vllm" and (self.num_beams > 1 or self.compile_generation):
            yield "vLLM samples, uncompiled: leave out num_beams and compile_generation, or rollout_engine vllm"

    def check_installed(self):
        """Raises a UserError for what the settings need and this machine lacks."""
        if self.rollout_engine == "vllm":
            check_vllm("rollout_engine")
        if self.compile_generation and not shutil.which("g++"):
            raise UserError(
                "compile_generation needs a C++ compiler, and g++ was not found: install it, or leave it out"
            )


def check_vllm(flag: str):
    """Raises a UserError unless vLLM is installed, which a flag has asked for."""
    if find_spec("vllm") is None:
        raise UserError(
            f"--{flag} vllm needs vLLM, which is not installed here: `make test-vllm` makes .venv-vllm with it (on "
            f"CUDA: `pip install vllm`), or --{flag} coati"
        )
