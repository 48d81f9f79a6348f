"""The emulator of CUDA C++ kernels: what its instructions compute, and each mistake it must see."""

import re
from pathlib import Path

import pytest
import torch
from emulator_checks import (
    CHECKS,
    MISTAKES,
    check_ldmatrix,
    check_mma,
    check_mma_of_tf32,
    check_shuffle,
    everything,
    load,
    run,
)


@pytest.fixture(scope="module")
def emulator():
    return load()


@pytest.mark.parametrize("rounding", ["exact", "chained", "truncating"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma(emulator, dtype, rounding):
    check_mma(emulator, dtype, rounding)


@pytest.mark.parametrize("rounding", ["chained", "truncating"])
def test_mma_of_tf32(emulator, rounding):
    check_mma_of_tf32(emulator, rounding)


def test_the_three_models_of_rounding_differ(emulator):
    results = [
        check_mma(emulator, torch.bfloat16, r).copy() for r in ("exact", "chained", "truncating")
    ]
    assert not (results[0] == results[1]).all()
    assert not (results[0] == results[2]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulator, transposed):
    check_ldmatrix(emulator, transposed)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_instruction(emulator, check):
    check(emulator)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(emulator, name, random):
    _, _, errors = run(emulator, name, random=random)
    assert MISTAKES[name] in errors
    # Whatever happens to the block, the next launch is none the worse for it.
    check_shuffle(emulator)


def test_an_error_names_its_thread_and_is_counted(emulator):
    _, _, errors = run(emulator, "race_of_writes")
    (line,) = errors.splitlines()
    named = r"another thread writes \(thread \d+\) by thread \d+ of block \(0, 0, 0\) at \+0x"
    assert re.search(named, line)
    emulator.run("race_of_writes", 0, 0, 0)
    assert list(emulator.report()["errors"].values()) == [31]


def test_a_launch_leaves_no_mapping_behind(emulator):
    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    emulator.launch_nothing(1, 1024, 0)
    # Each stack has a guard page: with many emulators a process would have no mappings left.
    assert mappings() < before + 100
    assert not emulator.report()["errors"]


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "said"),
    [
        (1, 1056, 0, "a block of 1056 threads"),
        (1, 32, 164 * 1024, "167936 bytes of shared memory: sm_80 has 166912"),
        (0, 32, 0, "a grid of 0 x 1 x 1 blocks"),
        (1, 40, 0, "whole warps"),
    ],
)
def test_a_launch_past_the_limits_is_refused(emulator, blocks, threads, shared, said):
    emulator.set_options(False, 1, "late", "exact", 80)
    emulator.report()
    emulator.launch_nothing(blocks, threads, shared)
    assert said in "\n".join(emulator.report()["errors"])


def test_an_architecture_has_its_own_limits(emulator):
    for architecture, refused in ((86, True), (90, False)):
        emulator.set_options(False, 1, "late", "exact", architecture)
        emulator.launch_nothing(1, 32, 120 * 1024)
        assert bool(emulator.report()["errors"]) == refused


def test_it_passes_what_its_mutants_fail(emulator):
    everything(emulator)
