"""What it takes to build the package: how it is measured, and what is said of it."""

import os
import subprocess
import sys

from bench import build
from bench.build import Build, faults, import_cost


def test_memory_is_that_of_a_whole_session():
    code = "import subprocess, sys; x = bytearray(60 << 20); subprocess.run([sys.executable, '-c', "
    code += "'x = bytearray(60 << 20); print(1, flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        process.stdout.readline()
        assert build._session_memory(process.pid) >= 120 << 20
        process.communicate(b"\n")
    assert build._session_memory(os.getpid() + (1 << 22)) == 0


def test_each_goal_that_is_missed_is_named():
    good = Build("cuda", 170, 10**9, 10**7, 9, 1, 30)
    assert not faults([good], 0.2, 10**6)
    bad = Build("cpu", 61, 4 * 10**9, 3 * 10**7, 11, 2, 30)
    said = "\n".join(faults([bad], 0.4, 10**8))
    for part in ("seconds 61.0, asked 60", "memory", "wheel", "unchanged", "changed kernel 2"):
        assert part in said
    assert "importing adds 0.40 s, asked 0.3" in said
    assert "importing adds 100 MB, asked 30" in said


def test_importing_costs_something():
    seconds, memory = import_cost()
    assert seconds > 0
    assert memory > 0


def test_a_build_is_measured(monkeypatch, tmp_path, capsys):
    output = tmp_path / "build.json"
    monkeypatch.setattr(build, "measure", lambda mode: Build(mode, 5.0, 10**8, 10**6, 1.0, 1, 2))
    monkeypatch.setattr(build, "import_cost", lambda: (0.1, 10**6))
    assert build.main(["--mode", "none", "cuda", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "| `cuda` | 5 | 0.10 GB | 1.0 MB | 1 s | besides, CUDA 12.4" in said
    assert "one changed kernel compiles 1 of 2 objects" in said
    assert '"mode": "none"' in output.read_text()
