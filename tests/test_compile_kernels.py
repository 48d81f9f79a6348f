"""Every Triton kernel compiles for GPUs that are not here, without spills and within their limits.

A run takes, of every kernel and size of tile, one launch for each architecture, another one where
there are several. `make compile-matrix` takes every launch that the kernel files name, for every
architecture, and keeps what came of it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuseformer.kernels import common
from triton.runtime.jit import mangle_type

from bench import binaries
from bench.known_spills import KNOWN_SPILLS, known_spill, new_faults
from bench.launches import (
    GFX942,
    SHARED_LIMIT,
    Launch,
    architecture,
    capability_of,
    half_precision,
    launches,
)
from fuseformer import kernels

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


@pytest.mark.parametrize(
    ("capability", "name", "launch"),
    [
        pytest.param(
            capability,
            name,
            launch,
            id=f"{architecture(capability)}-{name.replace(' ', '-')}",
        )
        for capability in CAPABILITIES
        for name, launch in chosen(capability)
    ],
)
def test_a_kernel_compiles_without_spills(capability, name, launch):
    """Those of bench/known_spills.py may spill what is written there, and not nothing."""
    binary = binaries.build(launch.spec, capability)
    row = {"spilled": binary.spilled, "faults": binaries.faults(binary, launch.spec, capability)}
    known = known_spill(name, capability)
    assert not new_faults(row, known)
    assert binary.spilled or not known


def test_known_spills_are_those_of_launches():
    for name, by_architecture in KNOWN_SPILLS.items():
        for there in by_architecture:
            assert name in launches(capability_of(there)), (name, there)


def test_no_kernel_leaves_an_order_of_sums_to_chance():
    """Results are the same bits every time: a simulator would not show that atomics are not."""
    files = sorted(Path(kernels.__path__[0]).glob("*.py"))
    assert len(files) > 20
    for file in files:
        assert "tl.atomic" not in file.read_text(), file.name


@pytest.mark.parametrize("dtype", common._POINTER_TYPES, ids=str)
def test_pointers_are_called_what_a_launch_calls_them(dtype):
    assert common._POINTER_TYPES[dtype] == mangle_type(torch.empty(0, dtype=dtype))


def small_product(capability: int = 80) -> Launch:
    """Return a launch with a product that compiles fast."""
    return next(
        launch
        for launch in launches(capability).values()
        if launch.kernel == "attention_forward" and launch.constants["BLOCK_D"] == 32
    )


def test_a_spill_is_seen():
    """The check must be able to fail: a kernel held to few registers has to spill."""
    assert any("spilled" in fault for fault in faults(small_product(), 80, maxnreg=64))


@pytest.mark.parametrize("capability", [80, GFX942])
def test_too_much_shared_memory_is_seen(monkeypatch, capability):
    monkeypatch.setitem(SHARED_LIMIT, capability, 1)
    found = faults(small_product(capability), capability)
    assert any("shared" in fault for fault in found)


@pytest.mark.parametrize("capability", [80, GFX942])
def test_a_product_without_tensor_cores_is_seen(monkeypatch, tmp_path, capability):
    """A pattern that finds nothing stands for a product that the compiler split into scalars."""
    monkeypatch.setattr(binaries, "CACHE", tmp_path)
    monkeypatch.setattr(binaries, "TENSOR_CORE", re.compile(r"\bno such instruction\b"))
    found = faults(small_product(capability), capability)
    assert "a product without tensor cores" in found
