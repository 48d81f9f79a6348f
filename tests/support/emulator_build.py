"""Builds of the emulator with the CUDA C++ kernels in it, as Python modules.

Objects are kept under ``build/emulator`` by what goes into them, so that only what has changed is
compiled, and two processes that want the same one share it. In "shadow" mode the kernels are
compiled with hooks at every load and store; nothing else is. In "sanitized" mode all is compiled
for AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python is:
`sanitized` has the command.
"""

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
RUNTIME = (
    "scheduler",
    "memory",
    "instrumentation",
    "bank_conflicts",
    "faults",
    "primitives",
    "tensor_cores",
)
FEED_FORWARD = ("backward", "feed_forward", "few_rows", "gated", "linear")
#: What the translation units of feed-forward offer for each dtype: the arguments of each function.
FEED_FORWARD_ENTRIES = {
    "feed_forward_forward": "const FeedForwardParams&, int, Activation, Stream",
    "feed_forward_backward": "const FeedForwardGradientParams&, int, Stream",
    "linear_activation": "const LinearParams&, Stream",
    "activation_gradient": "const ActivationGradientParams&, Stream",
    "gated_activation": "const LinearParams&, Stream",
    "gated_gradient": "const GatedGradientParams&, Stream",
    "few_rows_hidden": "const FewRowsParams&, Stream",
    "few_rows_output": "const FewRowsParams&, Stream",
}
MODES = {
    "plain": ["-O2"],
    "shadow": [
        *("-O1", "-g", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
        # Of arrays in registers no load or store comes by: their indices are checked where used.
        "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero",
        "-fsanitize-undefined-trap-on-error",
    ],
    # Bindings hide the types that checks of virtual tables would look for; null pointers and sizes
    # of objects are seen as addresses, at half the time to compile.
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


def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("the emulator needs g++: install a C++ compiler")
    return found


def _kept(name: str, inputs: Sequence[object], make) -> Path:
    """Return the file that `make` writes, made at most once for the same inputs."""
    CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]
    path = CACHE / f"{key}-{name}"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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


def compiled(source: Path, flags: Sequence[str], sources: Path = SOURCES) -> Path:
    """Return the object of a source file of `sources`, or of another that includes some of it."""
    command = [_compiler(), *_FLAGS, *flags, f"-I{sources}", "-x", "c++", "-c", source, "-o"]
    inputs = (_texts(source, sources), flags, _FLAGS)
    return _kept(f"{source.stem}.o", inputs, lambda part: _run([*command, part]))


def build(
    mode: str,
    kernels: Path | None = None,
    *,
    bindings: str = "bindings",
    host: Sequence[str] = ("attention/attention.cpp", "attention/decode.cpp"),
    sources: Path = SOURCES,
    runtime: Path = SOURCES,
) -> ModuleType:
    """Return the emulator with the kernels of a translation unit, those of attention unless given.

    `bindings` names the file of the emulator that offers them to Python, `host` the sources that
    check arguments and launch. The kernels' headers come from `sources`, the emulator from
    `runtime`: both may be changed copies of the folder. Raises `RuntimeError` with what the
    compiler said.
    """
    kernels = kernels or sources / "emulator" / "attention_kernels.cpp"
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    rest = MODES[mode] if mode == "sanitized" else ["-O2"]
    around = [*python, "-fvisibility=hidden", *(rest if mode == "sanitized" else [])]
    objects = [
        compiled(kernels, MODES[mode], sources),
        *(compiled(runtime / "emulator" / f"{name}.cpp", rest, runtime) for name in RUNTIME),
        *(compiled(sources / name, rest, sources) for name in host),
        compiled(SOURCES / "emulator" / f"{bindings}.cpp", around),
    ]
    names = [path.name for path in objects]
    # Two builds may be loaded at once: each calls its own functions.
    flags = ["-shared", "-Wl,-Bsymbolic", *(rest if mode == "sanitized" else [])]
    command = [_compiler(), *flags, *objects, "-ldl", "-o"]
    library = _kept("_emulator.so", (names, flags), lambda part: _run([*command, part]))
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
        kernels or sources / "emulator" / "feed_forward_kernels.cpp",
        bindings="feed_forward_bindings",
        host=tuple(f"feed_forward/{name}.cpp" for name in FEED_FORWARD),
        sources=sources,
    )


def feed_forward_unit(*built: str, text: str = "") -> str:
    """Return a translation unit with the bfloat16 kernels of a few functions: quickly compiled.

    `text` may define others, all that are left say that they were not built.
    """
    parts = ("backward_", "few_rows_", "gated_", "linear_", "")
    lines = [f'#include "feed_forward/{part}launch.h"' for part in parts]
    lines += ["namespace fuseformer {", text]
    for name, arguments in FEED_FORWARD_ENTRIES.items():
        for element in ("Bfloat16", "Half"):
            function = f"const char* {name}<{element}>({arguments})"
            if element == "Bfloat16" and name in built:
                lines.append(f"template {function};")
            elif f"{name}<{element}>" not in text:
                lines.append(f'template <> {function} {{ return "not built"; }}')
    lines += [
        f"template FeedForwardBackwardSizes feed_forward_backward_sizes<{element}>(int);"
        for element in ("Bfloat16", "Half")
    ]
    return "\n".join([*lines, "}", ""])


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
