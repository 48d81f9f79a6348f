"""Commands as a user types them, in an environment that this project has not touched."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command, cwd=ROOT, check=True, **changes):
    """Run a command in an environment where nothing of this project is set but `changes`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEFORMER_")}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment | {"SOURCE_DATE_EPOCH": "1700000000"} | changes,
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
