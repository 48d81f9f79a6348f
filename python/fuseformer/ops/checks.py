"""Checks of arguments; each error names the argument, what it got and what it wants."""

import math
from typing import Any

import torch
from torch import Tensor

from ..philox import draw_seed
from ..reference import ACTIVATIONS
from .registration import autocasts

# Float32 tells no wider cap from none, and no narrower one from 0; no sequence is longer than the
# window; logits of a larger scale would be past what float32 holds.
_CAPS = (2.0**-60, 2.0**100)
_WIDEST = 1 << 30
_STEEPEST = 2.0**100

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensor(name: str, x: Any, dims: int | None = None, *, like: Tensor | None = None) -> None:
    """Require a floating tensor, of `dims` dimensions and with the dtype and device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: got dtype {x.dtype}, expected float32, float16, bfloat16 or float64"
        )
    if dims is not None and x.ndim != dims:
        raise ValueError(f"{name}: got {x.ndim} dimensions {tuple(x.shape)}, expected {dims}")
    if like is not None:
        device(name, x, like)
        if x.dtype != like.dtype and not autocasts(x):
            raise TypeError(
                f"{name}: got dtype {x.dtype}, expected {like.dtype} as the first argument"
            )


def device(name: str, x: Tensor, like: Tensor) -> None:
    """Require `x` to be on the device of `like`."""
    if x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, expected {like.device}")


def shape(name: str, x: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Require the exact shape `expected`, described by `meaning`."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {meaning} = {expected}")


def integers(name: str, x: Any, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Require an integer or bool tensor of one of `dtypes` on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {wanted}")
    device(name, x, like)


def probability(name: str, p: float) -> float:
    """Return `p` after requiring a number from 0 to 1."""
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"{name}: got {type(p).__name__}, expected a number from 0 to 1")
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: got {p}, expected a number from 0 to 1")
    return float(p)


def finite(name: str, value: Any, *, positive: bool = False) -> float:
    """Return `value` as a float after requiring it to be finite, and above 0 if `positive`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not -math.inf < value < math.inf or (positive and value <= 0):
        wanted = "a finite number above 0" if positive else "a finite number"
        raise ValueError(f"{name}: got {value}, expected {wanted}")
    return float(value)


def softcap(value: Any) -> float:
    """Return the public `softcap` argument as a number that float32 holds, 0 for none."""
    if value is None:
        return 0.0
    least, most = _CAPS
    return min(max(finite("softcap", value, positive=True), least), most)


def scale(value: Any) -> float:
    """Return `value` after requiring a number up to 2**100, of either sign."""
    number = finite("scale", value)
    if abs(number) > _STEEPEST:
        raise ValueError(f"scale: got {value}, expected a number from -2**100 to 2**100")
    return number


def not_negative(name: str, value: Any) -> float:
    """Return `value` as a float after requiring it to be finite and 0 or more."""
    number = finite(name, value)
    if number < 0:
        raise ValueError(f"{name}: got {value}, expected a finite number from 0 up")
    return number


def count(name: str, value: Any) -> int:
    """Return `value` after requiring an integer from 0 up."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an integer")
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected an integer from 0 up")
    return value  # type: ignore[return-value]


def boolean(name: str, value: Any) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected True or False")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Require `value` to be one of the strings `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")


def activation(value: Any) -> None:
    """Require the name of an activation."""
    one_of("activation", value, ACTIVATIONS)


def causal(value: Any) -> str:
    """Return the internal name of the public `causal` argument."""
    if value is False or value is None:
        return "none"
    if value is True:
        return "top_left"
    if value == "bottom_right":
        return "bottom_right"
    raise ValueError(f"causal: got {value!r}, expected False, True or 'bottom_right'")


def window(value: Any) -> tuple[int, int]:
    """Return the public `window` argument as (left, right), -1 for an unbounded side."""
    if value is None:
        return -1, -1
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(n, int) and n >= -1 for n in value)
    ):
        raise ValueError(f"window: got {value!r}, expected (left, right) of integers from -1 up")
    return min(value[0], _WIDEST), min(value[1], _WIDEST)


def dropout_seed(seed: Any, p: float, like: Tensor) -> Tensor | None:
    """Return the seed tensor that dropout with probability `p` uses, or None without dropout."""
    if p == 0:
        return None
    if seed is None:
        return draw_seed(like.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != ():
            raise TypeError(
                f"seed: got {seed.dtype} of shape {tuple(seed.shape)}, expected an int64 scalar"
            )
        device("seed", seed, like)
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an int or an int64 tensor")
    return torch.full((), seed, dtype=torch.int64, device=like.device)
