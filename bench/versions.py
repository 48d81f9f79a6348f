"""``python -m bench versions``: every kernel compiled by every supported version of Triton.

Each version is installed by pip below build/ and takes the place of the one beside the pinned
PyTorch in a process of its own. Compiled for sm_80 and sm_90 is a part of the launches in which
every kernel meets each of its dtypes, options and switches. Prints a row a version; a launch that
does not compile, and a version that cannot be had, end with status 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from .launches import Launch, launches

#: Those that PyTorch 2.10 to 2.14 bring, and the newest.
TRITONS = ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0")
CAPABILITIES = (80, 90)
FOLDER = Path(__file__).parent.parent / "build" / "versions"


def features(launch: Launch) -> set[tuple[str, str, Any]]:
    """Return what a launch shows of its kernel: that it compiles for a dtype, with an option."""
    found: set[tuple[str, str, Any]] = {(launch.kernel, "dtype", launch.dtype)}
    found |= {(launch.kernel, "option", name) for name in launch.options}
    switches = {k: v for k, v in launch.constants.items() if isinstance(v, bool | str)}
    return found | {(launch.kernel, name, value) for name, value in switches.items()}


def covering(capability: int) -> dict[str, Launch]:
    """Return launches that together show all that the launches of an architecture show."""
    everything = launches(capability)
    missing = set[tuple[str, str, Any]]().union(*map(features, everything.values()))
    chosen = {}
    while missing:
        name = max(everything, key=lambda name: len(features(everything[name]) & missing))
        chosen[name] = everything[name]
        missing -= features(everything[name])
    return chosen


def compile_all() -> int:
    """Compile the covering sets with the Triton of this process; return how many failed."""
    failed = done = 0
    for capability in CAPABILITIES:
        target = GPUTarget("cuda", capability, 32)
        for name, launch in covering(capability).items():
            done += 1
            try:
                triton.compile(launch.spec.source(), target=target, options=launch.spec.options)
            except Exception as error:  # whatever the compiler raises
                failed += 1
                print(f"FAULT {name} on sm_{capability}: {error!r}"[:300], file=sys.stderr)
    print(f"triton {triton.__version__}: {done} launches, {failed} do not compile")
    return failed


def installed(version: str) -> Path:
    """Return the folder that holds a version of Triton, after installing it if need be.

    Raises `subprocess.CalledProcessError` where pip cannot get it.
    """
    folder = FOLDER / f"triton-{version}"
    if not folder.exists():
        part = folder.with_suffix(f".{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", part, f"triton=={version}"], check=True)
        part.rename(folder)
    return folder


def check(version: str) -> str | None:
    """Compile with a version in another process; return what is wrong, or None."""
    if version == triton.__version__:
        path = []
    else:
        try:
            path = [str(installed(version))]
        except subprocess.CalledProcessError:
            return "cannot be had here"
    path += [str(Path(__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    program = (
        "import sys, triton; from bench import versions; "
        f"assert triton.__version__ == {version!r}, triton.__file__; "
        "sys.exit(min(versions.compile_all(), 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment)
    return None if done.returncode == 0 else "does not compile every kernel"


def main(given: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench versions", description=__doc__)
    parser.add_argument("--triton", nargs="+", default=TRITONS, metavar="VERSION")
    problems = {version: check(version) for version in parser.parse_args(given).triton}
    for version, problem in problems.items():
        print(f"triton {version}: {problem or 'compiles every kernel'}")
    return int(any(problems.values()))
