"""Frozen weights that several models of a run have in common: in memory once.

Policy, critic and reward model are often adapters on one base. Each has loaded it, and none changes it: where two such
weights are equal to the last bit, both models get the same one. That they are is looked at and never concluded from
where they came from.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coati.models.base import BaseModel

WRAPPERS = ("base_layer", "original_module", "token_adapter")  # of peft, around weights that an adapter leaves alone
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def same_weight(new: nn.Parameter, known: nn.Parameter) -> bool:
    """Whether a new weight is a known one to the last bit, once it has that one's dtype: engines give frozen weights
    the same.

    Quantized weights of bitsandbytes in 4 bits are the same if they mean the same; those of other kinds never are, as
    layers keep more than the weight.
    """
    if new is known:
        return True
    state, known_state = (getattr(weight, "quant_state", None) for weight in (new, known))
    if state is not None and known_state is not None:
        return _same_values(state.as_dict(), known_state.as_dict()) and _same_bits(new.data, known.data)
    if type(new) is not nn.Parameter or type(known) is not nn.Parameter or new.shape != known.shape:
        return False
    if new.is_floating_point() != known.is_floating_point():
        return False
    return _same_bits(new.data.to(known.device, known.dtype), known.data)


class SharedWeights:
    """The frozen weights of a run's models, by their names in a transformer without a head: of those that live.

    Args:
        same: whether a new weight is a known one.
    """

    def __init__(self, same: Callable[[nn.Parameter, nn.Parameter], bool] = same_weight):
        self.same = same
        # a parameter that somebody refers to weakly can't be swapped, as moving a module may have to
        self.owners: dict[str, list[tuple[weakref.ref[nn.Module], str]]] = {}

    def share(self, model: BaseModel) -> int:
        """Gives a model the known weights in place of those of its frozen ones that are the same; the others are known
        from now on, as long as they live. Nothing may write to them.

        Returns:
            The bytes of the weights that it has given up.
        """
        shared: dict[nn.Parameter, nn.Parameter] = {}  # tied weights are given up together
        for path, module in model.transformer.named_modules():
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    continue
                name = _name_without_head(model.transformer, f"{path}.{attribute}")
                owners = [owner for owner in self.owners.get(name, ()) if owner[0]() is not None]
                if parameter not in shared:
                    known = [getattr(reference(), its_name) for reference, its_name in owners]
                    shared[parameter] = next((other for other in known if self.same(parameter, other)), parameter)
                if shared[parameter] is not parameter:
                    setattr(module, attribute, shared[parameter])
                    if hasattr(module, "quant_state"):  # bitsandbytes' layers have that of their weight too
                        module.quant_state = shared[parameter].quant_state
                if all(reference() is not module for reference, _ in owners):
                    owners.append((weakref.ref(module), attribute))
                self.owners[name] = owners
        return sum(parameter.nbytes for parameter, other in shared.items() if other is not parameter)


def _name_without_head(transformer: nn.Module, name: str) -> str:
    """A parameter's name where neither a head nor an adapter is around the model."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts).removeprefix(f"{transformer.base_model_prefix}.")


def _same_values(values: dict, known: dict) -> bool:
    """Of what describes two quantized weights: tensors, numbers and names."""
    if values.keys() != known.keys():
        return False
    pairs = [(values[name], known[name]) for name in values]
    return all(_same_bits(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """0 and -0 have different ones, a NaN has those of itself."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = BITS[one.dtype.itemsize]
    return torch.equal(one.to(other.device).view(bits), other.view(bits))
