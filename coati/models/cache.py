"""The KV cache by the name that transformers gives it, which changed in 5.24."""

import inspect
from typing import Any

from torch import nn


def cache_name(model: nn.Module) -> str:
    """The keyword of a transformers model's forward: `cache`, or before 5.24 `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output) -> Any:
    """The cache in a transformers model's output; None if there is none."""
    return output["cache"] if "cache" in output else output.get("past_key_values")
