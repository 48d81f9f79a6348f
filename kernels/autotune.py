"""``FUSEFORMER_AUTOTUNE=1``: search configs on the device at hand, and keep the winners.

Without it kernels with products take their configs from tables, the same on every machine of a
family. With it the first call of a kind tries what the tables hold for such kernels, and the same
with 4 and 8 warps and 1 to 4 stages, and writes the fastest to a file, which later runs read:
``tiles.json`` in ``$FUSEFORMER_CACHE``, else in ``fuseformer`` below
``$XDG_CACHE_HOME`` or ``~/.cache``.

A kind is which arguments there are, their types, the constants that make the kernel, and each size
up to the next power of two.
Winners go by device, by Triton's version and by the kernel's text: a kernel that has changed is
searched again. Processes that search at the same time may each keep another winner, and their
results may then differ in the last bits.
"""

import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

Config = TypeVar("Config", bound=tuple[int, ...])
_Winners = dict[str, dict[str, list[int]]]

# How long a config is tried, in milliseconds, and what it has to gain over the table's: less is
# noise.
_WARMUP, _REPETITIONS = 10, 50
_LEAST_GAIN = 0.03

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_winners: _Winners | None = None  # by machine and kind; None: not read yet

# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------


def is_on() -> bool:
    """Return whether the user asks for a search.

    Raises `ValueError` where FUSEFORMER_AUTOTUNE is neither 0 nor 1.
    """
    asked = os.environ.get("FUSEFORMER_AUTOTUNE", "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"FUSEFORMER_AUTOTUNE is {asked!r}, expected 0 or 1")
    return asked == "1"


def variants(configs: Iterable[Config], *, warps: int, stages: int) -> list[Config]:
    """Return configs, and each with 4 and 8 warps and 1 to 4 stages, which lie at these places."""
    found = dict.fromkeys(configs)
    for config, num_warps, num_stages in product(list(found), (4, 8), (1, 2, 3, 4)):
        values = list(config)
        values[warps], values[stages] = num_warps, num_stages
        found[_like(config, values)] = None
    return list(found)


def kind_of(kernel: triton.JITFunction, arguments: dict[str, Any], sizes: Iterable[int]) -> str:
    """Return what stands for a launch in the file of winners.

    `arguments` are the launch's but for its config: which of them are None, the types of the
    others and the constants, in capitals, make the kernel that is compiled.
    """
    words = [kernel.__name__, getattr(kernel, "cache_key", "")[:8]]
    for name, value in sorted(arguments.items()):
        if isinstance(value, Tensor):
            words.append(f"{name}:{str(value.dtype).removeprefix('torch.')}")
        elif name.isupper():
            words.append(f"{name}={value}")
        elif value is not None:
            words.append(name)
    classes = (str(triton.next_power_of_2(size)) for size in sizes)
    return " ".join([*words, "x".join(classes)])


def tuned(
    kernel: triton.JITFunction,
    arguments: dict[str, Any],
    sizes: Iterable[int],
    config: Config,
    candidates: Callable[[], list[Config]],
    run: Callable[[Config], object],
) -> Config:
    """Return the fastest config for a kind of launch: `config`, the table's, where nobody asks.

    `arguments` and `sizes` say what kind, as for `kind_of`; `run` does the work with a config, and
    has to bear repetition. Candidates that the device or the assembler refuses are passed over.
    While a CUDA graph is captured, and for empty tensors, nothing is tried.
    """
    if not is_on():
        return config
    sizes = list(sizes)
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta" or 0 in sizes:
        return config
    kind = kind_of(kernel, arguments, sizes)
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with _lock, guard:
        machine = _machine(device)
        kept = _load().get(machine, {}).get(kind)
        if kept is not None:
            if len(kept) != len(config):
                raise ValueError(f"{path()} holds no config for {kind!r}: {kept}; remove it")
            return _like(config, kept)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return config
        path().parent.mkdir(parents=True, exist_ok=True)  # where that fails, before the search
        best = _fastest(config, candidates(), run, device)
        _keep(machine, kind, best)
    return best


def _fastest(
    config: Config,
    candidates: list[Config],
    run: Callable[[Config], object],
    device: torch.device,
) -> Config:
    least = _milliseconds(lambda: run(config), device)
    best, least = config, least * (1 - _LEAST_GAIN)
    for candidate in candidates:
        if candidate == config:
            continue
        try:
            taken = _milliseconds(lambda candidate=candidate: run(candidate), device)
        except (OutOfResources, PTXASError, torch.OutOfMemoryError) as refused:
            _log.info("%s: %s", candidate, refused)
            continue
        except RuntimeError as failed:
            if "PassManager" not in str(failed):  # of the compiler, for this config
                raise
            _log.info("%s: %s", candidate, failed)
            continue
        if taken < least:
            best, least = candidate, taken
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


# ------------------------------------------------------------------------------------------------
# The file of winners
# ------------------------------------------------------------------------------------------------


def path() -> Path:
    """Return the file that keeps the winners."""
    if folder := os.environ.get("FUSEFORMER_CACHE"):
        return Path(folder) / "tiles.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fuseformer" / "tiles.json"


def _load() -> _Winners:
    """Return the winners, read once."""
    global _winners
    if _winners is None:
        _winners = _read()
    return _winners


def _read() -> _Winners:
    """Read the file; raise `ValueError` where it is not what `_keep` writes."""
    if not path().exists():
        return {}
    try:
        return {
            machine: {kind: [int(value) for value in config] for kind, config in kept.items()}
            for machine, kept in json.loads(path().read_text()).items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path()} does not hold configs ({error}): remove it") from error


def _keep(machine: str, kind: str, config: tuple[int, ...]) -> None:
    """Add a winner to the file, beside what other processes have added meanwhile."""
    winners = _load()
    winners.setdefault(machine, {})[kind] = list(config)
    with _file_lock():
        everything = _read()
        for there, kept in winners.items():
            everything.setdefault(there, {}).update(kept)
        # A reader finds the old file or the new one, whole.
        partial = path().with_suffix(f".{os.getpid()}")
        try:
            partial.write_text(json.dumps(everything, indent=1, sort_keys=True))
            os.replace(partial, path())
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _file_lock() -> Iterator[None]:
    """Keep other processes from writing the file meanwhile, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path().with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
