"""What the rollout engine leaves behind: nothing, whatever the garbage collector does."""

import gc
import weakref

import pytest
import torch

from coati.models import Actor
from coati.rollout import GenerationConfig, Request, RolloutEngine
from coati.rollout.engine.batch import ContinuousBatch
from tests.models.families import tiny_config


@pytest.mark.parametrize("slots", [1, 8])
def test_keys_and_values_go_with_the_call(slots):
    seen = []

    class Remembering(ContinuousBatch):
        def decode(self, rows, width):
            super().decode(rows, width)
            seen.extend(weakref.ref(layer.keys.untyped_storage()) for layer in self.state.cache.layers)

    actor = Actor(config=tiny_config("llama")).eval()
    engine = RolloutEngine(actor, GenerationConfig(max_new_tokens=3), eos_ids=[2], slots=slots)
    engine.batch_class = Remembering
    gc.disable()
    try:
        with torch.no_grad():
            engine.generate([Request([5, 6, 7 + i]) for i in range(3)])
        assert seen and all(storage() is None for storage in seen)
    finally:
        gc.enable()
