"""The CUDA C++ kernels as nvcc makes them: their instructions, their registers, their scores."""

import re

import pytest

from bench import cuda_kernels
from bench.cuda_kernels import Kernel, Result, problems

FORWARD = Kernel("forward", 128, "bf16", False)
BACKWARD = Kernel("backward", 64, "bf16", False)

#: What the emulator models of instructions that threads carry out together, or later.
MODELLED = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "cp.async.cg.shared.global",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "shfl.sync.bfly.b32",
    "bar.sync",
    "bar.warp.sync",
    "red.global.add.f32",
    "red.release.gpu.global.add.s32",
    "ld.acquire.gpu.global.s32",
    "membar.gl",
    "fence.acq_rel.gpu",
    "fence.sc.gpu",
}
_TOGETHER = re.compile(
    r"sync|async|^atom|^red\b|^red\.|barrier|^bar|fence|membar|acquire|release|volatile|vote|match|"
    r"elect|redux|wgmma|tcgen05|^ldmatrix|^stmatrix|^mma|^shfl"
)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("dtype", cuda_kernels.ELEMENTS)
def test_the_kernels_hold_no_collective_instruction_that_the_emulator_does_not_model(
    which, dtype, dropout
):
    ptx = cuda_kernels.compile_kernel(Kernel(which, 64, dtype, dropout), 80, "ptx").decode()
    used = set(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)[\s;]", ptx, re.M))
    together = {name for name in used if _TOGETHER.search(name)}
    assert together <= MODELLED
    # The list would be empty if nothing was found at all.
    assert len(together) >= 8


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD], ids=str)
def test_scores_on_sm_80_meet_the_goals_without_spills(kernel):
    result = cuda_kernels.measure(kernel, 80)
    assert not problems({(kernel, 80): result})
    assert result.score is not None
    assert result.edge_score is not None
    assert result.edge_score <= 1.5 * result.score


@pytest.mark.parametrize("architecture", [90, 120])
def test_newer_architectures_compile(architecture):
    assert cuda_kernels.measure(FORWARD, architecture).spilled == 0


def test_what_is_wrong_is_named():
    assert not problems({(FORWARD, 80): Result(200, 0, 1.4, 1.5)})
    assert "score 1.43, asked 1.42" in problems({(FORWARD, 80): Result(200, 0, 1.43, 1.5)})[0]
    assert "8 bytes spilled" in problems({(FORWARD, 90): Result(200, 8)})[0]
