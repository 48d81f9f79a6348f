"""What every custom op of the package needs besides its formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_fragment = torch.library.Library("fuseformer", "FRAGMENT")


def present(x: Tensor | None, like: Tensor) -> Tensor:
    """Return `x`, or an empty tensor where an op's schema promises one and there is none."""
    return like.new_empty(0) if x is None else x


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


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op on `x` will run: that of an active autocast, else its own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
