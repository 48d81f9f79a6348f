"""Which parts of a layer an op may stand for: those whose call would do nothing else."""

from typing import Any

import torch
from torch.nn.modules import module as _hooks

# What the op stands for. A profiler may replace a method of the class for a while.
_FORWARDS: dict[type, Any] = {
    kind: kind.forward
    for kind in (
        torch.nn.Dropout,
        torch.nn.GELU,
        torch.nn.LayerNorm,
        torch.nn.Linear,
        torch.nn.ReLU,
        torch.nn.SiLU,
    )
}


def is_plain(module: Any, kind: Any) -> bool:
    """Return whether `module` is just a `kind`, whose call an op may replace.

    A subclass, a parametrised or swapped module computes something else; so does a `forward` that
    was replaced, on the module (offloading, quantisers) or on its class (profilers). Hooks, the
    module's own or global ones, want to be called: pruning and `torch.nn.utils.weight_norm` renew a
    layer's weight in them.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and kind.forward is _FORWARDS[kind]
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or _hooks._global_forward_hooks
            or _hooks._global_forward_pre_hooks
            or _hooks._global_backward_hooks
            or _hooks._global_backward_pre_hooks
        )
    )


def fusable(weight: Any) -> bool:
    """Return whether an op may read `weight`, a module's parameter or None.

    Not where it is a wrapper, such as a quantised or a distributed tensor, which decides itself
    what a product with it is.
    """
    if type(weight) is torch.nn.Parameter:
        return True
    return not (
        hasattr(weight, "__tensor_flatten__") or torch.overrides.has_torch_function((weight,))
    )


def runs(owner: Any, name: str, kind: type) -> bool:
    """Return whether the method `name` of `owner` is that of the class `kind`: not replaced."""
    return name not in owner.__dict__ and getattr(type(owner), name) is getattr(kind, name)


def leaf(module: torch.nn.Module, *arguments: Any) -> Any:
    """Return the call of `module` as one node of the graph that `torch.fx.symbolic_trace` makes.

    So are modules of `torch.nn`, whose masks and shapes a symbolic tracer cannot look at either.
    The first of `arguments` is the tracer's proxy.
    """
    tracer = arguments[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})
