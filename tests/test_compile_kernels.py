"""Every Triton kernel compiles for GPUs that are not here, without spills and within their limits.

A run takes, of every kernel and size of tile, one launch for each architecture, another one each
time. `make compile-matrix` takes every launch that the kernel files name, for every architecture,
and keeps what came of it.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from bench import binaries
from bench.known_spills import is_known
from bench.launches import (
    GFX942,
    SHARED_LIMIT,
    Launch,
    architecture,
    half_precision,
    launches,
)

CAPABILITIES = (80, 90, 100, 120, GFX942)


def faults(launch: Launch, capability: int, **options: int) -> list[str]:
    """Compile a launch and return what is wrong with the result, as phrases."""
    binary = binaries.build(launch.spec, capability, **options)
    return binaries.faults(binary, launch.spec, capability)


def tile_class(launch: Launch) -> tuple[Any, ...]:
    """Return what launches must share for one of them to stand for the others.

    Single precision attention is one class: it needs no tensor cores, and its products compile
    slowly.
    """
    arguments = launch.spec.arguments
    if launch.kernel.startswith("attention") and not half_precision(launch.spec):
        return launch.kernel, "single"
    width = arguments.get("BLOCK_D") or arguments.get("BLOCK_W")
    if width:
        return launch.kernel, max(width, 32)
    # Kernels without products differ by how many values a thread owns.
    return launch.kernel, arguments.get("ROWS"), arguments.get("BLOCK_N", 0) > 512


def chosen(capability: int) -> Iterator[tuple[str, Launch]]:
    """Yield the launches to compile for an architecture: one of each tile class, in turn."""
    classes: dict[tuple[Any, ...], list[tuple[str, Launch]]] = {}
    for name, launch in launches(capability).items():
        classes.setdefault(tile_class(launch), []).append((name, launch))
    for index, members in enumerate(classes.values()):
        turn = CAPABILITIES.index(capability) + index
        yield members[turn % len(members)]


SPILLS = pytest.mark.xfail(strict=True, reason="named in bench/known_spills.py")


@pytest.mark.parametrize(
    ("capability", "launch"),
    [
        pytest.param(
            capability,
            launch,
            id=f"{architecture(capability)}-{name.replace(' ', '-')}",
            marks=[SPILLS] if is_known(name, capability) else [],
        )
        for capability in CAPABILITIES
        for name, launch in chosen(capability)
    ],
)
def test_a_kernel_compiles_without_spills(capability, launch):
    assert not faults(launch, capability)


def small_product() -> Launch:
    """Return a launch with a product that compiles fast."""
    return next(
        launch
        for launch in launches(80).values()
        if launch.kernel == "attention_forward" and launch.constants["BLOCK_D"] == 32
    )


def test_a_spill_is_seen():
    """The check must be able to fail: a kernel held to few registers has to spill."""
    assert any("spilled" in fault for fault in faults(small_product(), 80, maxnreg=64))


def test_too_much_shared_memory_is_seen(monkeypatch):
    monkeypatch.setitem(SHARED_LIMIT, 80, 1)
    assert any("shared" in fault for fault in faults(small_product(), 80))


def test_a_product_without_tensor_cores_is_seen(monkeypatch, tmp_path):
    """A pattern that finds nothing stands for a product that the compiler split into scalars."""
    monkeypatch.setattr(binaries, "CACHE", tmp_path)
    monkeypatch.setattr(binaries, "TENSOR_CORE", re.compile(r"\bno such instruction\b"))
    assert "a product without tensor cores" in faults(small_product(), 80)
