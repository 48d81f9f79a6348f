"""What a build can use on this machine: a C++ compiler, torch's headers, CUDA; and its mode.

torch is not imported: its headers are enough, those of any torch from 2.10 on.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "none", "cpu", "cuda")
LEAST_TORCH = (2, 10)
LEAST_CUDA = (12, 4)
#: Architectures that can be asked for, with the first toolkit that compiles them.
ARCHITECTURES = {
    "80": (11, 0),
    "86": (11, 1),
    "87": (11, 4),
    "89": (11, 8),
    "90": (11, 8),
    "100": (12, 8),
    "103": (12, 9),
    "120": (12, 8),
    "121": (12, 9),
}
DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")
#: What brings torch's headers and a CUDA toolkit into a build environment that has none.
TORCH_REQUIREMENT = "torch>=2.10"
CUDA_REQUIREMENTS = tuple(
    f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "nvvm")
)
# Programs that run a compiler, which nvcc wants by itself.
_LAUNCHERS = ("ccache", "sccache", "distcc")


class Missing(Exception):
    """What a build needs and this machine has not, with the remedy."""


@dataclass(frozen=True)
class Toolchain:
    """A mode and what its build uses; `refused` says why no mode with more was taken."""

    mode: str
    refused: tuple[str, ...] = ()
    cxx: tuple[str, ...] = ()
    cxx_version: str = ""
    torch_include: Path | None = None
    torch_version: str = ""
    cuda_home: Path | None = None
    cuda_version: tuple[int, int] | None = None
    architectures: tuple[str, ...] = ()

    @property
    def cuda(self) -> str | None:
        """The version of the toolkit, as people write it."""
        return ".".join(map(str, self.cuda_version)) if self.cuda_version else None

    @property
    def host_compiler(self) -> tuple[str, list[str]]:
        """The compiler for nvcc, without what launches it, and the arguments of it."""
        words = list(self.cxx)
        if Path(words[0]).name in _LAUNCHERS and len(words) > 1:
            del words[0]
        return shutil.which(words[0]) or words[0], words[1:]


def package_folders() -> list[Path]:
    """Return where packages are: in pip's build isolation, the outer environment's too."""
    paths = [*sys.path, *(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def find_torch() -> tuple[Path, str]:
    """Return the include folder of the torch that is installed, and its version."""
    too_old = None
    for root in (folder / "torch" for folder in package_folders()):
        version = root / "version.py"
        text = version.read_text() if version.exists() else ""
        said = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)", text)
        if said is None:
            continue
        if (int(said[2]), int(said[3])) < LEAST_TORCH:
            too_old = f"torch {said[1]} in {root} is too old"
        elif (root / "include/torch/csrc/stable/library.h").exists():
            return root / "include", said[1]
    raise Missing(
        f"{too_old or 'no torch was found'}: pip install '{TORCH_REQUIREMENT}', or build with "
        "--no-build-isolation in the environment that has it"
    )


def find_cuda() -> tuple[Path, tuple[int, int]]:
    """Return a CUDA toolkit, whose nvcc and static runtime are there, and its version."""
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [folder / "nvidia/cu13" for folder in package_folders()]
    places += [Path(nvcc).resolve().parents[1]] if nvcc else []
    for home in [Path(named)] if named else [*places, Path("/usr/local/cuda")]:
        compiler = home / "bin/nvcc"
        if not compiler.exists() or cuda_libraries(home) is None:
            continue
        try:
            said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        except OSError as error:
            said = str(error)
        version = re.search(r"release (\d+)\.(\d+)", said)
        if version is None:
            raise Missing(
                f"{compiler} does not run, it says {said.strip()!r}: mend it, or name another "
                "toolkit in CUDA_HOME"
            )
        known = (int(version[1]), int(version[2]))
        if known < LEAST_CUDA:
            raise Missing(
                f"{home} is CUDA {known[0]}.{known[1]}, {LEAST_CUDA[0]}.{LEAST_CUDA[1]} or newer "
                "is needed: pip install 'fuseformer[cuda]' brings one, CUDA_HOME names one"
            )
        return home, known
    looked = f"CUDA_HOME={named}" if named else "this environment, PATH or /usr/local/cuda"
    raise Missing(
        f"no nvcc with libcudart_static.a was found in {looked}: pip install 'fuseformer[cuda]' "
        "brings both, CUDA_HOME names a toolkit"
    )


def cuda_libraries(home: Path) -> Path | None:
    """Return the folder of a toolkit that has the static runtime."""
    folders = [home / name for name in ("lib64", "lib")]
    return next((p for p in folders if (p / "libcudart_static.a").exists()), None)


def find_compiler() -> tuple[tuple[str, ...], str]:
    """Return the words that start the C++ compiler, and what it says its version is."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    if not words or shutil.which(words[0]) is None:
        raise Missing(
            f"no C++ compiler {' '.join(words)!r} was found: install g++, or name one in CXX"
        )
    done = subprocess.run([*words, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(words)} does not run, it says {done.stderr.strip()!r}")
    return tuple(words), done.stdout.partition("\n")[0]


def find_architectures(cuda: tuple[int, int]) -> tuple[str, ...]:
    """Return the architectures to compile, those asked for or what of the usual ones is known.

    Raises `SystemExit` for one asked for that this project, or the toolkit, does not know.
    """
    known = [name for name, least in ARCHITECTURES.items() if cuda >= least]
    asked = os.environ.get("FUSEFORMER_ARCHS", "").strip()
    if not asked:
        usual = [name for name in DEFAULT_ARCHITECTURES if name in known]
        return (f"{usual[0]}+PTX", *usual[1:])
    names = tuple(asked.split(","))
    for name in names:
        if name.removesuffix("+PTX") not in known:
            raise SystemExit(
                f"FUSEFORMER_ARCHS: got {name!r}, expected some of {', '.join(known)}, "
                f"each with or without +PTX, by commas (CUDA {cuda[0]}.{cuda[1]})"
            )
    return names


def _check_host() -> None:
    if platform.system() != "Linux":
        raise Missing(
            f"compiled libraries are built on Linux, not {platform.system()}: Python and PyTorch "
            "serve there"
        )
    if importlib.util.find_spec("pybind11") is None:
        raise Missing("pybind11 was not found: pip install pybind11")


def _toolchain(mode: str, refused: tuple[str, ...]) -> Toolchain:
    """Return what a build in `mode` uses. Raises `Missing`."""
    if mode == "none":
        return Toolchain("none", refused)
    _check_host()
    home = version = None
    names: tuple[str, ...] = ()
    if mode == "cuda":
        home, version = find_cuda()
        names = find_architectures(version)
    include, torch_version = find_torch()
    cxx, cxx_version = find_compiler()
    return Toolchain(mode, refused, cxx, cxx_version, include, torch_version, home, version, names)


def asked_mode() -> str:
    """Return the mode that is asked for. Raises `SystemExit` for one that is none."""
    mode = os.environ.get("FUSEFORMER_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"FUSEFORMER_BUILD: got {mode!r}, expected {', '.join(MODES)}")
    return mode


def decide() -> Toolchain:
    """Return the mode of this build and what it uses.

    Raises `SystemExit` where a mode was asked for by name and cannot be had: it says what is
    missing and the command that brings it.
    """
    mode = asked_mode()
    if mode != "auto":
        try:
            return _toolchain(mode, ())
        except Missing as missing:
            raise SystemExit(f"FUSEFORMER_BUILD={mode}: {missing}") from missing
    refused: list[str] = []
    for candidate in ("cuda", "cpu"):
        try:
            return _toolchain(candidate, tuple(refused))
        except Missing as missing:
            refused.append(f"not {candidate}: {missing}")
    return Toolchain("none", tuple(refused))


def jobs() -> int:
    """Return how many compilers may run at once. Raises `SystemExit` for no number."""
    asked = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    if not asked.isdecimal() or int(asked) < 1:
        raise SystemExit(f"MAX_JOBS: got {asked!r}, expected a number of compilers, 1 or more")
    return int(asked)
