"""Running code in a process of its own where Triton's interpreter executes the kernels."""

import os
import subprocess
import sys


def run_interpreted(code: str) -> str:
    """Return what `code` prints; raises `AssertionError` with its last words where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-3000:]}"
    return done.stdout
