"""The CUDA C++ kernels as nvcc makes them: their instructions, their registers, their scores."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

from bench import cuda_kernels
from bench.cuda_kernels import Kernel, Result, problems

FORWARD = Kernel("forward", 128, "bf16", False)
BACKWARD = Kernel("backward", 64, "bf16", False)
WIDE = Kernel("backward", 256, "bf16", False)
#: Those with the fewest registers to spare.
CROWDED = [
    Kernel("backward", 128, "bf16", False),
    *(
        Kernel("backward", 256, "bf16", dropout, small)
        for dropout in (False, True)
        for small in (False, True)
    ),
]

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


@pytest.mark.parametrize("source", sorted(cuda_kernels.SOURCES.rglob("*.cu")), ids=lambda p: p.stem)
def test_what_ships_holds_no_collective_instruction_that_the_emulator_does_not_model(
    source, tmp_path
):
    target = tmp_path / "kernels.ptx"
    command = [cuda_kernels.nvcc(), "-std=c++17", "-O3", "-arch=compute_80", "-ptx"]
    command += ["-Werror", "all-warnings"]
    subprocess.run([*command, source, "-o", target], check=True)
    used = set(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)[\s;]", target.read_text(), re.M))
    together = {name for name in used if _TOGETHER.search(name)}
    assert together <= MODELLED
    # The list would be empty if nothing was found at all.
    assert len(together) >= 5


def test_the_tf32_product_assembles_though_no_kernel_uses_it_yet(tmp_path):
    source, target = tmp_path / "tf32.cu", tmp_path / "tf32.ptx"
    source.write_text(
        '#include "device/mma.h"\n'
        "__global__ void product(float* d, const float* a) {\n"
        "  using namespace fuseformer;\n"
        "  float sums[4] = {};\n"
        "  const uint32_t rows[4] = {to_tf32(a[0]), to_tf32(a[1]), to_tf32(a[2]), to_tf32(a[3])};\n"
        "  mma_16x8x8_tf32(sums, rows, to_tf32(a[4]), to_tf32(a[5]));\n"
        "  for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = sums[i];\n"
        "}\n"
    )
    command = [cuda_kernels.nvcc(), "-std=c++17", f"-I{cuda_kernels.SOURCES}", source]
    subprocess.run([*command, "-arch=compute_80", "-ptx", "-o", target], check=True)
    text = target.read_text()
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in text
    assert text.count("cvt.rna.tf32.f32") == 6
    subprocess.run([*command, "-arch=sm_80", "-cubin", "-o", tmp_path / "tf32.cubin"], check=True)


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD, WIDE], ids=str)
def test_scores_on_sm_80_meet_the_goals_without_spills(kernel):
    result = cuda_kernels.measure(kernel, 80)
    assert not problems({(kernel, 80): result})
    assert result.score is not None
    assert result.edge_score is not None
    assert result.edge_score <= 1.5 * result.score


@pytest.mark.parametrize("kernel", CROWDED, ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_the_backward_pass_spills_nothing(kernel, architecture):
    assert cuda_kernels.measure(kernel, architecture).spilled == 0


def test_the_product_of_gated_blocks_scores_as_the_plain_one():
    kernel = Kernel("gated", 128, "bf16", True)
    result = cuda_kernels.measure(kernel, 80)
    assert result.spilled == 0
    assert result.score <= cuda_kernels.GOALS["gated", 128]
    assert result.edge_score <= 1.5 * result.score


@pytest.mark.parametrize(
    ("which", "matrices"),
    [("gated gradient", 0), ("few-rows", 1), ("few-rows", 2), ("few-rows output", 1)],
)
def test_what_memory_bounds_has_no_score_and_no_spill(which, matrices):
    kernel = Kernel(which, matrices, "fp16", False)
    result = cuda_kernels.measure(kernel, 80)
    assert result.score is None
    assert result.spilled == 0
    assert result.registers <= 128  # else too few warps wait for memory
    assert not problems({(kernel, 80): result})


def shared_accesses(binary, folder):
    """Return how many accesses to shared memory cuxray can follow, and how many have conflicts."""
    cubin, out = folder / "kernel.cubin", folder / "report.json"
    cubin.write_bytes(binary)
    tools = Path(knobs.nvidia.nvdisasm.path).parent
    said = subprocess.run(
        [tools / "cuobjdump", "-elf", cubin], capture_output=True, text=True, check=True
    ).stdout
    threads = int(re.search(r"EIATTR_MAX_THREADS.*?Value:\s*(0x[0-9a-f]+)", said, re.DOTALL)[1], 16)
    environment = os.environ | {"CUXRAY_NO_FETCH": "1"}
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    command = [Path(sys.executable).parent / "cuxray", "report", cubin, "--threads", str(threads)]
    command += ["--smem-dynamic", "65536", "--json", "-o", out]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    access = json.loads(out.read_text())["units"][0]["kernels"][0]["access"]
    followed = sum(site["count"] for site in access["by_site"] if site["space"] == "shared")
    return followed, access["conflicted_shared_accesses"]


# Not those of 255 registers, which nvdisasm does not take here.
@pytest.mark.parametrize(
    ("which", "size"),
    [
        ("forward", 64),
        ("forward", 96),
        ("forward", 128),
        ("forward", 256),
        ("backward", 64),
        ("backward", 256),
        ("feed-forward", 128),
        ("feed-forward backward", 128),
        ("gated", 128),
    ],
)
def test_cuxray_finds_no_bank_conflict(which, size, tmp_path):
    """In what it can follow of the binary; the emulator counts them all."""
    binary = cuda_kernels.compile_kernel(Kernel(which, size, "bf16", False), 80)
    followed, conflicts = shared_accesses(binary, tmp_path)
    assert followed > 50
    assert conflicts == 0


def test_cuxray_sees_a_swizzle_that_is_missing(monkeypatch, tmp_path):
    shutil.copytree(cuda_kernels.SOURCES, tmp_path / "csrc")
    tile = tmp_path / "csrc/device/tile.h"
    text = tile.read_text()
    swizzle = "return kWhole ? row & 7 : row >> 1 & 3;"
    assert swizzle in text
    tile.write_text(text.replace(swizzle, "return row & 0;"))
    monkeypatch.setattr(cuda_kernels, "SOURCES", tmp_path / "csrc")
    _, conflicts = shared_accesses(cuda_kernels.compile_kernel(FORWARD, 80), tmp_path)
    assert conflicts > 0


@pytest.mark.parametrize("architecture", [90, 120])
def test_newer_architectures_compile(architecture):
    assert cuda_kernels.measure(FORWARD, architecture).spilled == 0


def test_what_is_wrong_is_named():
    assert not problems({(FORWARD, 80): Result(200, 0, 1.4, 1.5)})
    assert "score 1.43, asked 1.42" in problems({(FORWARD, 80): Result(200, 0, 1.43, 1.5)})[0]
    assert "8 bytes spilled" in problems({(FORWARD, 90): Result(200, 8)})[0]


def test_the_command_prints_a_table_and_names_what_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda_kernels, "kernels", lambda dtypes: [FORWARD])
    monkeypatch.setattr(cuda_kernels, "measure", lambda *_: Result(200, 4, 1.5, 1.8))
    output = tmp_path / "scores.json"
    assert cuda_kernels.main(["--output", str(output)]) == 1
    said = capsys.readouterr()
    row = next(line for line in said.out.splitlines() if line.startswith("forward bf16 128 sm_80"))
    assert row.split()[4:] == ["200", "4", "1.500", "1.800", "1.20", "1.42", "1.446"]
    assert "FAULT forward bf16 128 on sm_80: 4 bytes spilled" in said.err
    assert '"score": 1.5' in output.read_text()
