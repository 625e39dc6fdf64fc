"""Where a mixture of experts has its experts and their routers, as transformers 5 builds it."""

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a layer's experts in stacked weights, as transformers has them."""
    return hasattr(module, "num_experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router, which gives logits `[tokens, experts]`, and weights and experts `[tokens, k]`."""
    return type(module).__name__.lower().endswith("topkrouter")


def routers_beside(block: nn.Module | None) -> list[nn.Module]:
    """The routers in a block of experts."""
    return [] if block is None else [part for part in block.children() if is_router(part)]


def parameters_of_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a matrix for each expert."""
    modules = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    return [f"{name}.{key}" for name, m in modules for key, p in m.named_parameters(recurse=False) if p.ndim == 3]
