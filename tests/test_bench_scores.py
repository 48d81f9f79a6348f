"""Reading loops, and the check that keeps scores from getting worse.

Head dims 64 and 128 on sm_80 are compiled and scored in every run; `make compile-matrix` measures
all launches on all architectures, and writes what the others are held against.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench import binaries, goals, scores
from bench.known_spills import KNOWN_SPILLS
from bench.launches import SHARED_LIMIT, Launch, capability_of, describe, launches
from bench.loops import Loop, instruction_macs, product_loops

STORED = scores.load(scores.STORED)
SAME_COMPILERS = STORED["compilers"] == binaries.versions()


# ------------------------------------------------------------------------------------------------
# Loops
# ------------------------------------------------------------------------------------------------


def disassembly(*lines):
    """Write lines as nvdisasm does: labels, or (stall, text)."""
    text = ["\t.section\t.text.kernel", "kernel:", ".text.kernel:"]
    for number, line in enumerate(lines):
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        stall, instruction = line
        text.append(f"        /*{number * 16:04x}*/   {instruction} ;  /* 0x{number:016x} */")
        text.append(f"                                 /* 0x{stall << 41:016x} */")
    return "\n".join(text)


MMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"  # 2,048 multiply-adds


def test_full_and_edge_loop_are_told_apart_by_their_cycles():
    loops = product_loops(
        disassembly(
            (2, "MOV R1, c[0x0][0x28]"),
            (5, "@P0 BRA `(.L_x_2)"),
            ".L_x_0",
            (2, MMA),
            (0, MMA),  # issuing takes a cycle at least
            (4, "@!P1 CALL.REL.NOINC `(.L_x_1)"),
            (3, "BRA `(.L_x_0)"),
            ".L_x_1",
            (1, "NOP"),
            ".L_x_2",
            (6, MMA),
            (2, "FSEL R4, R4, -INF, P2"),
            (5, "@P3 BRA `(.L_x_2)"),
            ".L_x_3",
            (5, "EXIT"),
            ".L_x_4",
            (1, "BRA `(.L_x_4)"),
        )
    )
    assert loops == [Loop(".L_x_0", 10, 4, 4096), Loop(".L_x_2", 13, 3, 2048)]


def test_only_the_innermost_loop_counts_and_blocks_out_of_line_belong_to_it():
    loops = product_loops(
        disassembly(
            ".L_x_0",
            (1, "IADD3 R1, R1, 0x1, RZ"),
            ".L_x_1",
            (2, MMA),
            (3, "@P0 BRA `(.L_x_5)"),
            ".L_x_2",
            (4, "@P1 BRA `(.L_x_1)"),
            ".L_x_3",
            (5, "@P2 BRA `(.L_x_0)"),
            ".L_x_4",
            (1, "LDG.E R2, [R4]"),
            (2, "@P3 BRA `(.L_x_4)"),  # a loop without products
            ".L_x_6",
            (1, "EXIT"),
            ".L_x_5",
            (7, MMA),
            (8, "BRA `(.L_x_2)"),
        )
    )
    assert loops == [Loop(".L_x_1", 2 + 3 + 4 + 7 + 8, 5, 4096)]


def test_straight_code_has_no_loops():
    assert product_loops(disassembly((1, MMA), (1, "EXIT"))) == []
    assert product_loops("") == []


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.16816.F32", 2048),
        ("HMMA.1688.F32", 1024),
        ("HMMA.1688.F32.TF32", 0),
        ("HGMMA.64x128x16.F32.BF16", 32768),
        ("HGMMA.64x8x16.F32", 2048),
        ("FFMA", 0),
    ],
)
def test_multiply_adds_of_instructions(opcode, macs):
    assert instruction_macs(opcode) == macs


def named(capability, *texts):
    return scores.work([capability], list(texts))


@pytest.mark.parametrize("capability", [80, 90])
def test_cycles_are_those_of_cuxray_sched(capability, tmp_path):
    launch = next(iter(named(capability, "attention_forward bf16", "HEAD_DIM=32 ").values()))
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(launch.spec.source(), target=target, options=launch.spec.options)
    source, cubin, out = (tmp_path / f"kernel.{suffix}" for suffix in ("ptx", "cubin", "json"))
    # sched wants control flow, which is not to be had from what the assembler for sm_80 writes.
    source.write_text(compiled.asm["ptx"])
    architecture = {80: "sm_80", 90: "sm_90a"}[capability]
    newest = knobs.nvidia.ptxas_blackwell.path
    subprocess.run([newest, f"-arch={architecture}", source, "-o", cubin], check=True)
    environment = os.environ | {"CUXRAY_NO_FETCH": "1"}
    folders = [os.path.dirname(newest), environment["PATH"]]
    environment["PATH"] = os.pathsep.join(folders)
    command = [Path(sys.executable).parent / "cuxray", "sched", cubin, "--json", "-o", out]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    theirs = {
        loop["header"]: (loop["est_issue_stall_cycles_per_iter"], loop["instructions"])
        for result in json.loads(out.read_text())["results"]
        for loop in result["loops"]
    }
    ours = product_loops(binaries.disassemble(cubin.read_bytes()))
    assert len(ours) == 2
    assert all(theirs[loop.header] == (loop.cycles, loop.instructions) for loop in ours)


# ------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------


def test_names_are_distinct_and_leave_the_config_out():
    found = launches(80)
    assert len(found) > 100
    for name, launch in found.items():
        assert name.startswith(launch.kernel)
        assert launch.config["warps"] in (1, 2, 4, 8, 16)
    name = "attention_forward bf16 GROUP=1 HEAD_DIM=64 BLOCK_D=64 ALIGN=8"
    assert set(found[name].config) == {"BLOCK_M", "BLOCK_N", "EDGE_N", "warps", "stages"}
    assert describe(found[name].spec) == found[name]


# ------------------------------------------------------------------------------------------------
# The check
# ------------------------------------------------------------------------------------------------


def plain(capability) -> scores.Work:
    """Return attention in bf16 with head dim 64 or 128 and no options, and its backward."""

    def chosen(launch: Launch) -> bool:
        small = launch.constants.get("HEAD_DIM") in (64, 128) and not launch.options
        return launch.dtype == "bf16" and launch.kernel.startswith("attention") and small

    return {k: v for k, v in named(capability, "attention", "GROUP=1").items() if chosen(v)}


@pytest.mark.skipif(not SAME_COMPILERS, reason="the stored scores are of other compilers")
@pytest.mark.parametrize("capability", [80, 90])
def test_scores_have_not_become_worse(capability):
    rows = scores.measure_all(plain(capability), 1)
    assert len(rows) == 6
    assert all("score" in row and "edge_score" in row for row in rows.values())
    assert not scores.problems(rows, STORED)


def stored_rows() -> scores.Rows:
    return {
        (name, capability_of(architecture)): row
        for name, rows in STORED["launches"].items()
        for architecture, row in rows.items()
    }


def test_every_launch_is_in_the_stored_matrix_as_it_is_and_no_other():
    """`make compile-matrix` measures them all."""
    work, rows = scores.work(list(SHARED_LIMIT), []), stored_rows()
    assert set(rows) == set(work)
    assert [key for key, launch in work.items() if rows[key]["config"] != launch.config] == []


def test_the_stored_matrix_meets_the_goals():
    """All but one: on sm_90 the exponentials of a tile take the tensor cores' whole time."""
    work = scores.work([80, 90], [])
    lines = goals.summary(work, stored_rows()).splitlines()
    missed = [line for line in lines if line.endswith(("missed", "scored"))]
    assert [line.split("  ")[0] for line in missed] == ["attention forward, head dim 64"]
    assert "sm_90" in missed[0]


def test_the_stored_matrix_has_no_faults_but_the_known_ones():
    assert not scores.problems(stored_rows(), None)


ROW = {"config": {"BLOCK_M": 64}, "registers": 99, "spilled": 0, "shared": 0, "score": 1.2}
KEPT = {"launches": {"a bf16": {"sm_80": ROW | {"edge_score": 1.5}}, "b": {"sm_90": ROW}}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"score": 1.2 * 1.029}, None),
        ({"score": 1.0, "edge_score": 1.2}, None),
        ({"config": {"BLOCK_M": 128}}, None),
        ({"score": 1.2 * 1.05}, "a bf16 on sm_80: score"),
        ({"edge_score": 1.5 * 1.05}, "a bf16 on sm_80: edge_score"),
        ({"score": None}, "a bf16 on sm_80: score None, was 1.2"),
        ({"faults": ["8 bytes of registers spilled per thread"]}, "8 bytes of registers"),
        ({"error": "RuntimeError: no"}, "a bf16 on sm_80: RuntimeError: no"),
    ],
)
def test_the_check_fails_where_it_must(change, problem):
    rows = {("a bf16", 80): ROW | {"edge_score": 1.5} | change}
    found = scores.problems(rows, KEPT, [])
    if problem is None:
        assert not found
    else:
        assert len(found) == 1
        assert problem in found[0]


def test_a_known_spill_is_no_problem_but_a_larger_one_is(monkeypatch):
    monkeypatch.setitem(KNOWN_SPILLS, "a bf16", {"sm_80": 8})

    def spills(count, capability=80, more=()):
        spill = f"{count} bytes of registers spilled per thread"
        row = ROW | {"spilled": count, "faults": [spill, *more], "tensor_instructions": 1}
        return {("a bf16", capability): row}

    assert not scores.problems(spills(8), None)
    assert "KNOWN: 8 bytes" in scores.table(spills(8))
    for rows in (spills(16), spills(8, 90)):
        [problem] = scores.problems(rows, None)
        assert "bytes of registers spilled per thread" in problem
        assert "FAULT: " in scores.table(rows)
    [problem] = scores.problems(spills(8, more=["200 bytes of shared memory"]), None)
    assert problem == "a bf16 on sm_80: 200 bytes of shared memory"
    [problem] = scores.problems({("a bf16", 80): ROW}, None)
    assert problem == "a bf16 on sm_80: spills nothing, but is listed in bench/known_spills.py"


def test_launches_that_one_side_lacks_are_named():
    rows = {("a bf16", 80): KEPT["launches"]["a bf16"]["sm_80"], ("c", 90): ROW}
    missing = ["c on sm_90: not in the stored matrix", "b on sm_90: stored, but no longer launched"]
    assert scores.problems(rows, KEPT, []) == missing
    # Those that were not asked for are not missing.
    assert not scores.problems({("a bf16", 80): ROW | {"edge_score": 1.5}}, KEPT, ["bf16"])


def failing(spec, capability, **options):
    if capability == 80:
        raise RuntimeError("ptxas fatal\nlong story")
    if capability == 90:
        os._exit(3)  # as a compiler that aborts
    return binaries.Binary(32, 0, 0, 0, 1, True, scores=(1.0, 1.25))


def test_a_failed_compilation_is_a_row_and_stops_nothing(monkeypatch):
    monkeypatch.setattr(binaries, "build", failing)
    items = {k: v for c in (80, 90, 86) for k, v in list(named(c, "decode_merge bf16").items())[:2]}
    rows = scores.measure_all(items, 2)
    assert list(rows) == list(items)
    for (_, capability), row in rows.items():
        if capability == 86:
            assert (row["score"], row["edge_score"]) == (1.0, 1.25)
        else:
            ended = "the compiler ended its process"
            assert row["error"] == ("RuntimeError: ptxas fatal" if capability == 80 else ended)
    assert len(scores.problems(rows, None)) == 4
    assert "ptxas fatal" in scores.table(rows)


def test_goals_add_up_the_products_of_a_backward_in_two_kernels():
    items = plain(80)
    rows = {key: {"score": 1.3, "edge_score": 1.95} for key in items}
    text = goals.summary(items, rows)
    [line] = [t for t in text.splitlines() if "backward over 5 products, head dim 64" in t]
    assert line.split()[-2:] == ["1.85", f"{1.3 * 7 / 5:.3f}"]
    [line] = [
        t for t in text.splitlines() if "edge loop over full loop, forward, head dim 128" in t
    ]
    assert line.split()[-1] == "1.500"
    assert "not scored" in text
    wanted = {name for name, launch in launches(80).items() if goals.needed(launch, 80)}
    assert {name for name, _ in items} < wanted
    assert any("linear_activation" in name for name in wanted)


def test_the_command_writes_what_it_later_checks(tmp_path, capsys):
    stored, again = tmp_path / "matrix.json", tmp_path / "again.json"
    name = "attention_forward bf16 GROUP=1 HEAD_DIM=32 BLOCK_D=32 ALIGN=8 window_right"
    only = ["--family", "sm_80", "--match", name]
    assert scores.main([*only, "--output", str(stored)]) == 0
    printed = capsys.readouterr().out
    assert name in printed
    assert "attention forward, head dim 64" in printed
    kept = scores.load(stored)
    row = kept["launches"][name]["sm_80"]
    assert row["spilled"] == 0
    assert row["tensor_instructions"] > 0
    assert 1 < row["score"] < row["edge_score"] < 10
    # What another run adds is kept beside it, in an order of its own.
    kept["launches"] = {"zero": {"sm_90": ROW, "sm_80": ROW}, **kept["launches"]}
    scores.save(kept, again)
    assert scores.main([*only, "--output", str(again)]) == 0
    assert list(scores.load(again)["launches"]) == [name, "zero"]
    assert list(scores.load(again)["launches"]["zero"]) == ["sm_80", "sm_90"]

    assert scores.main([*only, "--check", str(stored)]) == 0
    row["score"] = round(row["score"] / 1.05, 3)
    scores.save(kept, stored)
    capsys.readouterr()
    assert scores.main([*only, "--check", str(stored)]) == 1
    assert f"FAULT {name} on sm_80: score" in capsys.readouterr().err
    kept["compilers"]["triton"] = "1.0"
    scores.save(kept, stored)
    for option in ("--check", "--output"):
        with pytest.raises(SystemExit) as ended:
            scores.main([*only, option, str(stored)])
        assert ended.value.code == 2
        assert "other compilers" in capsys.readouterr().err
