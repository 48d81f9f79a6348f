"""``FUSEFORMER_AUTOTUNE=1``: search configs on the device at hand, and keep the winners.

Without it every kernel takes its config from a table, and the same call gives the same bits on
every machine of a family. With it the first call of a kind tries what the tables hold for such
kernels, with more warps and stages, and writes the fastest to a file, which later runs read:
``tiles.json`` in ``$FUSEFORMER_CACHE``, else in ``fuseformer`` below ``$XDG_CACHE_HOME`` or
``~/.cache``. Winners go by device and by Triton's version.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.errors import TritonError

Config = TypeVar("Config", bound=tuple[int, ...])

#: What a config is tried for, in milliseconds.
_WARMUP, _REPETITIONS = 10, 50

_winners: dict[str, dict[str, list[int]]] | None = None


def is_on() -> bool:
    """Return whether the user asks for a search.

    Raises `ValueError` where FUSEFORMER_AUTOTUNE is neither 0 nor 1.
    """
    asked = os.environ.get("FUSEFORMER_AUTOTUNE", "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"FUSEFORMER_AUTOTUNE is {asked!r}, expected 0 or 1")
    return asked == "1"


def path() -> Path:
    """Return the file that keeps the winners."""
    if folder := os.environ.get("FUSEFORMER_CACHE"):
        return Path(folder) / "tiles.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fuseformer" / "tiles.json"


def variants(configs: Iterable[Config], *, warps: int, stages: int) -> list[Config]:
    """Return each config with 4 and 8 warps and 1 to 4 stages, which have these places in it."""
    found: dict[Config, None] = {}
    for config, num_warps, num_stages in product(configs, (4, 8), (1, 2, 3, 4)):
        values = list(config)
        values[warps], values[stages] = num_warps, num_stages
        found[_like(config, values)] = None
    return list(found)


def size_class(size: int) -> int:
    """Return what stands for `size` in a request: a new length shall not start a new search."""
    return triton.next_power_of_2(size)


def tuned(
    kernel: str,
    request: tuple[Any, ...],
    config: Config,
    candidates: Callable[[], list[Config]],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """Return the fastest config of a kernel for a kind of call: `config` where nobody asks.

    `request` says what kind, in values whose texts tell them apart; `run` does the work with a
    config, and has to bear repetition. Candidates that the device or the compiler refuses are
    passed over. While a CUDA graph is captured nothing is tried.
    """
    if not is_on() or device.type == "meta":
        return config
    name = f"{kernel} {' '.join(map(str, request))}"
    kept = _load().setdefault(_machine(device), {})
    if name in kept:
        return _like(config, kept[name])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return config
    best, least = config, _milliseconds(lambda: run(config), device)
    for candidate in candidates():
        if candidate == config:
            continue
        try:
            taken = _milliseconds(lambda candidate=candidate: run(candidate), device)
        except TritonError:  # too much shared memory, too many registers, no code
            continue
        if taken < least:
            best, least = candidate, taken
    _keep(_machine(device), name, best)
    return best


def _like(config: Config, values: list[int]) -> Config:
    """Return `values` as what `config` is: a tuple, named or not."""
    make = getattr(type(config), "_make", type(config))
    return make(values)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a run, the first one, which compiles, not counted."""
    run()
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=_WARMUP, rep=_REPETITIONS, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _machine(device: torch.device) -> str:
    """Return what a winner is a winner on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def _load() -> dict[str, dict[str, list[int]]]:
    """Return the winners by machine and request, read once.

    Raises `ValueError` where the file is not what `_keep` writes.
    """
    global _winners
    if _winners is None:
        _winners = _read()
    return _winners


def _read() -> dict[str, dict[str, list[int]]]:
    if not path().exists():
        return {}
    try:
        return {machine: dict(kept) for machine, kept in json.loads(path().read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path()} does not hold configs ({error}): remove it") from error


def _keep(machine: str, name: str, config: tuple[int, ...]) -> None:
    """Add a winner to the file, besides what other processes have added meanwhile."""
    _load()[machine][name] = list(config)
    everything = _read()
    everything.setdefault(machine, {})[name] = list(config)
    path().parent.mkdir(parents=True, exist_ok=True)
    # A reader finds the old file or the new one, whole.
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False) as file:
        json.dump(everything, file, indent=1, sort_keys=True)
    os.replace(file.name, path())
