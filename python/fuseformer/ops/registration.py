"""What every custom op of the package needs besides its formula."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_fragment = torch.library.Library("fuseformer", "FRAGMENT")


def present(x: Tensor | None, like: Tensor) -> Tensor:
    """Return `x`, or an empty tensor where an op's schema promises one and there is none."""
    return like.new_empty(0) if x is None else x


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` with the strides of ``torch.empty_like(like)``, copied where it has others.

    A fake promises strides, and code that was compiled against it reads by them.
    """
    strides = torch.empty_like(like, device="meta").stride()
    if x.stride() == strides:
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def in_order(x: Tensor | None) -> Tensor | None:
    """Return a small tensor as every kernel reads it: contiguous.

    Ops pass what has no strides of its own in a launch (offsets, slopes, sinks) through this, and
    lengths through `lengths_within`, so that no backend need think of layouts.
    """
    return None if x is None else x.contiguous()


def lengths_within(lengths: Tensor, most: int) -> Tensor:
    """Return `lengths` in int32 and contiguous; they may be negative or more than `most` still.

    Those of 64 bits are bounded first: kernels bound what they are given, but it would wrap.
    """
    if lengths.dtype != torch.int32:
        lengths = lengths.clamp(0, most).to(torch.int32)
    return lengths.contiguous()


def absent(x: Tensor) -> Tensor | None:
    """Return None for the empty tensor that stands for a missing result, else `x`."""
    return None if x.shape == (0,) else x


def register_autocast(op: Any, cast: tuple[str, ...]) -> None:
    """Run `op` in the autocast dtype: cast its floating tensor arguments named in `cast`.

    `torch.library.register_autocast` fixes one dtype when the op is defined; this one asks which
    dtype the surrounding `torch.autocast` chose. float64 tensors stay as they are, as in PyTorch.
    """
    schema = op._opoverload._schema
    positions = [i for i, argument in enumerate(schema.arguments) if argument.name in cast]

    def rule(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
        def autocast(*args: Any) -> Any:
            values = list(args)
            dtype = torch.get_autocast_dtype(device_type)
            for i in positions:
                x = values[i] if i < len(values) else None
                if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                    values[i] = x.to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op._opoverload(*values)

        return autocast

    name = schema.name.split("::")[1]
    keys = torch._C.DispatchKey
    _fragment.impl(name, rule("cpu", keys.AutocastCPU), "AutocastCPU")
    _fragment.impl(name, rule("cuda", keys.AutocastCUDA), "AutocastCUDA")


def autocasts(x: Tensor) -> bool:
    """Return whether `torch.autocast` is active for the device of `x`; a meta device has none."""
    # `torch.amp.is_autocast_available` would say the same; torch 2.11 cannot trace it.
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op on `x` will run: that of an active autocast, else its own."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_float_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which PyTorch gives a norm or a softmax of values of `dtype`.

    On a GPU, where `x` tells, autocast makes it float32; on the CPU it leaves them alone.
    """
    if dtype in (torch.float16, torch.bfloat16) and x.device.type == "cuda" and autocasts(x):
        return torch.float32
    return dtype


def second_derivatives(
    formula: Callable[..., Any], inputs: Sequence[Any], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of `inputs` such that they can be differentiated again.

    `formula` is the op's twin in plain PyTorch, called with `inputs`; `gradients` are those of its
    results. Backward takes this way where autograd records it (``create_graph=True``): the backward
    kernels have no derivative of their own. Things among `inputs` that need no gradient give None.
    """
    # Views, for an input may be a result of another one, of this very op, or given twice.
    inputs = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    results = formula(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    used = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in used],
            leaves,
            [g.to(y.dtype) for y, g in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs]
