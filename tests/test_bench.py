import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["attention", "feed_forward", "layer", "train_step"])
def test_quick_run_prints_a_table_and_writes_json_and_plot(name, tmp_path):
    done = run(name, "--quick", "--threads", "1", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "FLOP: " in done.stdout
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["rows"]
    for row in document["rows"]:
        assert row["median_s"] > 0
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["name"] in done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "option"), [("scores", "--check"), ("bytes", "--match")])
def test_the_commands_that_measure_kernels_are_found(name, option):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_an_unknown_benchmark_is_refused():
    done = run("training_in_space")
    assert done.returncode == 2
    assert "attention" in done.stderr


def test_a_wrong_candidate_is_caught_before_it_is_timed():
    code = (
        "import torch; from bench.timer import Candidate, verify\n"
        "good = lambda: (torch.ones(3),)\n"
        "verify([Candidate('good', good)], good, good())\n"
        "verify([Candidate('wrong', lambda: (torch.ones(3) + 1e-3,))], good, good())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "wrong, result 0: error" in done.stderr
