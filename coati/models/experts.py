"""Where a mixture of experts has its experts and their routers, as transformers 5 builds it."""

from collections.abc import Mapping

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a layer's experts in stacked weights, as transformers has them."""
    return hasattr(module, "num_experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router, which gives logits `[tokens, experts]`, and weights and experts `[tokens, k]`."""
    return type(module).__name__.lower().endswith("topkrouter")


def router_of(modules: Mapping[str, nn.Module], experts: str) -> nn.Module | None:
    """The router of a layer's experts, which stands in the block that they are in; None if it is unknown.

    Args:
        modules: the model's, by name.
        experts: their name. Adapters may stand between the block and them.
    """
    block = experts.rpartition(".")[0]
    while block and type(modules[block]).__module__.startswith("peft."):
        block = block.rpartition(".")[0]
    routers = [part for part in modules[block].children() if is_router(part)]
    return routers[0] if routers else None


def parameters_of_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a matrix for each expert."""
    modules = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    return [f"{name}.{key}" for name, m in modules for key, p in m.named_parameters(recurse=False) if p.ndim == 3]
