"""Faults that a GPU would show, planted into a process that has the strict device: what the tests of this folder must
catch."""

import os
import time

import numpy as np
import torch

LONG = 6.0  # seconds that rank 0 takes


def mask_on_the_cpu():
    """The mask of a decoding step is made without saying where."""
    from coati.rollout.engine.cache import SlotCache

    visible = SlotCache.visible
    SlotCache.visible = lambda *arguments: visible(*arguments).inner.clone()


def positions_on_the_cpu():
    """A model's forward makes a tensor of its own without saying where."""
    from coati.models.actor import Actor

    forward = Actor.forward

    def misplaced(self, input_ids, attention_mask=None, **options):
        log_probs = forward(self, input_ids, attention_mask, **options)
        return log_probs * torch.arange(input_ids.shape[1])

    Actor.forward = misplaced


def wait_in_each_layer():
    """A layer asks the device for a number."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def asks(self, hidden_states, *args, **kwargs):
        if hidden_states.abs().max() > 1e4:
            raise ValueError("hidden states explode")
        return forward(self, hidden_states, *args, **kwargs)

    LlamaDecoderLayer.forward = asks


def wait_for_each_row():
    """The engine reads its rows one by one."""
    from coati.transfer import Download

    def one_by_one(self, *tensors):
        self.copies = [[number.item() for number in tensor] for tensor in tensors]

    Download.__init__, Download.arrays = one_by_one, lambda self: [np.array(copy) for copy in self.copies]


def pageable_copies():
    """Batches travel from memory that isn't pinned."""
    torch.Tensor.pin_memory = lambda self: self


def tokens_read_too_early():
    """The engine reads copies that are still on their way."""
    from coati.transfer import Download

    Download.arrays = lambda self: [copy.numpy() for copy in self.copies]


def gradients_read_too_early():
    """Nothing waits for the stream that reduces gradients, once all are on their way."""
    from tests.device.work import StrictAccelerator

    StrictAccelerator.synchronize = lambda self, device=None: None


def rank_0_prepares_and_writes_slowly():
    """Data that takes long to tokenize, and models that take long to write."""
    from coati.data import dataset
    from coati.models.base import BaseModel

    build, save = dataset._build, BaseModel.save_pretrained
    dataset._build = slowly(build)
    BaseModel.save_pretrained = slowly(save)


def rank_0_steps_slowly():
    """The others wait in a collective call on the device's tensors."""
    from coati.parallel.ddp import DDPEngine

    forward = DDPEngine.__call__
    DDPEngine.__call__ = slowly(forward)


def slowly(function):
    def slow(*args, **kwargs):
        if os.environ["RANK"] == "0":
            time.sleep(LONG)
        return function(*args, **kwargs)

    return slow


def pipeline_overlaps():
    """Pipeline parallelism with ZeRO reduces on another stream, which its schedule doesn't wait for."""
    from coati.parallel.hybrid import HybridPlugin

    make = HybridPlugin.__init__
    HybridPlugin.__init__ = lambda self, *args, **settings: make(
        self, *args, **settings | {"overlap_communication": True}
    )
