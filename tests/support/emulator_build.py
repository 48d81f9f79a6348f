"""Builds of the emulator with the CUDA C++ kernels in it, as Python modules.

Objects are kept under ``build/emulator`` by what goes into them, so that only what has changed is
compiled, and two processes that want the same one share it. In "shadow" mode the kernels are
compiled with hooks at every load and store; nothing else is. In "sanitized" mode all but the
bindings is compiled for AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded
before Python is: `sanitized` has the command.
"""

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
RUNTIME = (
    "scheduler",
    "barriers",
    "memory",
    "instrumentation",
    "bank_conflicts",
    "faults",
    "primitives",
    "tensor_cores",
)
STANDARD_HEADERS = (
    "algorithm",
    "cmath",
    "cstdint",
    "cstring",
    "functional",
    "limits",
    "map",
    "set",
    "string",
    "type_traits",
    "vector",
)
#: The sources of each family that check arguments and launch.
HOST = {
    "attention": ("attention", "decode"),
    "feed_forward": ("backward", "feed_forward", "few_rows", "gated", "linear"),
}
MODES = {
    "plain": ["-Og"],  # what takes time are the primitives, which are compiled with -O2
    "shadow": [
        *("-O1", "-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
        # Of arrays in registers no load or store comes by: their indices are checked where used.
        "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero",
        "-fsanitize-undefined-trap-on-error",
    ],
    # Null pointers and sizes of objects are seen as addresses, at half the time to compile.
    "sanitized": [
        *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr,null,object-size"),
        *("-fno-sanitize-recover=all", "--param", "asan-instrumentation-with-call-threshold=0"),
    ],
}
_FLAGS = ["-std=c++17", "-march=native", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror"]


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def compiler() -> str:
    """Return the path of g++."""
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("the emulator needs g++: install a C++ compiler")
    return found


def _kept(
    name: str, inputs: Sequence[object], make: Callable[[Path], None], *, wait: bool = True
) -> Path | None:
    """Return the file that `make` writes, made at most once for the same inputs.

    Without `wait`, return None where another process is making it.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]
    path = CACHE / f"{key}-{name}"
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if not path.exists():
            part = path.with_suffix(".part")
            make(part)
            part.replace(path)
    return path


def _texts(source: Path, sources: Path) -> list[tuple[str, str]]:
    """Return a source and the project's headers that it includes, others through them too."""
    found: dict[Path, str] = {}
    left = [source]
    while left:
        path = left.pop()
        if path not in found:
            found[path] = path.read_text()
            for name in re.findall(r'^#include "([^"]+)"', found[path], re.MULTILINE):
                beside = (path.parent / name).resolve()
                left.append(beside if beside.exists() else sources.resolve() / name)
    names = {path: path.name if path == source else str(path) for path in found}
    root = f"{sources.resolve()}/"
    return sorted((name.removeprefix(root), found[path]) for path, name in names.items())


def _precompiled_headers(flags: Sequence[str]) -> list[str | Path]:
    """Return the arguments that include the standard's headers, parsed once for these flags."""
    text = "".join(f"#include <{name}>\n" for name in STANDARD_HEADERS)

    def make(part: Path) -> None:
        header = part.with_suffix("")  # beside which what is parsed will be looked for
        header.write_text(text)
        _run([compiler(), *_FLAGS, *flags, "-x", "c++-header", header, "-o", part])

    made = _kept("standard.h.gch", (text, flags, _FLAGS, _machine()), make)
    assert made is not None
    return ["-include", made.with_suffix("")]


@cache
def _machine() -> str:
    """Return the compiler's version and what it takes this processor for."""
    asked = [compiler(), "-march=native", "-Q", "--help=target"]
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in ([compiler(), "--version"], asked)
    ]
    return "".join(said)


def _compiled(source: Path, flags: Sequence[str], sources: Path, *, wait: bool) -> Path | None:
    """Return the object of a source file of `sources`, or of another that includes some of it.

    Without `wait`, return None where another process is compiling it.
    """
    inputs = (_texts(source, sources), flags, _FLAGS, STANDARD_HEADERS, _machine())

    def make(part: Path) -> None:
        # Hundreds of variants of the kernels are compiled for shadow mode.
        headers = _precompiled_headers(flags) if flags == MODES["shadow"] else []
        command = [compiler(), *_FLAGS, *flags, *headers, f"-I{sources}", "-x", "c++"]
        _run([*command, "-c", source, "-o", part])

    return _kept(f"{source.stem}.o", inputs, make, wait=wait)


def kept_object(source: Path, flags: Sequence[str], sources: Path) -> Path:
    """Return the object of a source file of `sources`, compiled with these flags alone."""

    def make(part: Path) -> None:
        _run([compiler(), *flags, f"-I{sources}", "-c", source, "-o", part])

    inputs = (_texts(source, sources), flags, _machine())
    made = _kept(f"{source.stem}.o", inputs, make)
    assert made is not None
    return made


def _all_compiled(work: Sequence[tuple[Path, Sequence[str], Path]]) -> list[Path]:
    """Return the objects of sources. What another process is compiling is left to it until last."""
    made = [_compiled(*item, wait=False) for item in work]
    made = [path or _compiled(*item, wait=True) for path, item in zip(made, work, strict=True)]
    return [path for path in made if path is not None]


def _linked(objects: Sequence[Path], flags: Sequence[str]) -> Path:
    # Two builds may be loaded at once: each calls its own functions.
    flags = ["-shared", "-Wl,-Bsymbolic", *flags]
    command = [compiler(), *flags, *objects, "-ldl", "-o"]
    inputs = ([path.name for path in objects], flags)
    library = _kept("_emulator.so", inputs, lambda part: _run([*command, part]))
    assert library is not None
    return library


def link_all_families(sources: Path = SOURCES) -> Path:
    """Return one library of the emulator and the kernels and host code of all families.

    Raises `RuntimeError` with what the linker said, of functions defined twice or not at all.
    """
    work: list[tuple[Path, Sequence[str], Path]] = [
        (SOURCES / "emulator" / f"{name}.cpp", ["-O2"], SOURCES) for name in RUNTIME
    ]
    for family, host in HOST.items():
        units = sorted((sources / family).glob("*.cu"))
        work += [(unit, MODES["plain"], sources) for unit in units]
        work += [(sources / family / f"{name}.cpp", ["-O2"], sources) for name in host]
    return _linked(_all_compiled(work), ["-Wl,--no-undefined"])


def build(
    mode: str,
    kernels: Path | None = None,
    *,
    family: str = "attention",
    bindings: str = "bindings",
    host: Sequence[str] | None = None,
    sources: Path = SOURCES,
    runtime: Path = SOURCES,
) -> ModuleType:
    """Return the emulator with the kernels of a translation unit, those that ship unless given.

    `family` names the folder of those, `bindings` the file of the emulator that offers them to
    Python, `host` the sources that check arguments and launch, those of the family unless given.
    The kernels' headers come from `sources`, the emulator from `runtime`: both may be changed
    copies of the folder. Raises `RuntimeError` with what the compiler said.
    """
    units = [kernels] if kernels else sorted((sources / family).glob("*.cu"))
    host = HOST[family] if host is None else host
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    rest = MODES[mode] if mode == "sanitized" else ["-O2"]
    objects = _all_compiled(
        [
            *((unit, MODES[mode], sources) for unit in units),
            *((runtime / "emulator" / f"{name}.cpp", rest, runtime) for name in RUNTIME),
            *((sources / family / f"{name}.cpp", rest, sources) for name in host),
            (SOURCES / "emulator" / f"{bindings}.cpp", [*python, "-fvisibility=hidden"], SOURCES),
        ]
    )
    library = _linked(objects, rest if mode == "sanitized" else [])
    # pybind11 takes two modules of one name for the same.
    spec = importlib.util.spec_from_file_location(f"{library.name[:24]}._emulator", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_feed_forward(
    mode: str, kernels: Path | None = None, *, sources: Path = SOURCES
) -> ModuleType:
    """Return the emulator with the feed-forward kernels, or those of another translation unit."""
    return build(
        mode,
        kernels,
        family="feed_forward",
        bindings="feed_forward_bindings",
        sources=sources,
    )


def build_planted(
    make: Callable[..., ModuleType],
    unit: str,
    folder: Path,
    file: str,
    correct: str = "",
    wrong: str = "",
) -> ModuleType:
    """Return a checked build, by `make`, of the kernels of `unit` with a text replaced in one file.

    Fails where the text is no longer there; without one nothing is replaced. `folder` is a new one.
    """
    copy, kernels = folder / "csrc", folder / "kernels.cpp"
    shutil.copytree(SOURCES, copy)
    source = (copy / file).read_text()
    assert correct in source, f"{file} has changed: plant the bug anew"
    (copy / file).write_text(source.replace(correct, wrong) if correct else source)
    kernels.write_text(unit)
    module = make("shadow", kernels, sources=copy)
    module.set_options(True, 1, "late", "exact", 80)
    return module
