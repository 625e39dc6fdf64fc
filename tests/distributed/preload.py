"""Imported once by the process that forks workers: everything that takes seconds, and nothing that starts a thread."""

from coati.parallel.runtime import quiet_colossalai

quiet_colossalai()

import colossalai.booster.plugin  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import coati.trainers.ppo  # noqa: E402
import coati.trainers.reward  # noqa: E402
import coati.trainers.sft  # noqa: E402, F401
