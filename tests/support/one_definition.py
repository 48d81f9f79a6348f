"""What a linker takes in silence: functions and types of one name with two definitions in ``csrc``.

Of an inline function that two files define it keeps one, of either body. So all headers are
compiled as one file, where a second definition of anything is an error; the other sources are
compiled alone, and what their objects define is compared by the place of each definition, types by
``-Wodr``. The kernels of all families are linked into one library besides, where functions that
are not inline collide.
"""

import os
import re
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pybind11
import torch
from emulator_build import SOURCES, compiler, kept_object

#: Needs PyTorch's headers, which take longer than all others: the sources have it compiled.
TORCH_HEADER = "stable_tensor.h"
#: Needs CUDA's headers, and defines nothing outside a namespace without a name.
LEFT_OUT = "library.cpp"
_FLAGS = ("-std=c++20", "-O0", "-fPIC", "-w")
#: -g1 has the places of functions, which objects for -Wodr do not keep.
_PLACES, _TYPES = ("-g1",), ("-flto",)
_INCLUDES = (
    f"-I{sysconfig.get_path('include')}",
    f"-I{pybind11.get_include()}",
    f"-I{Path(torch.__file__).parent / 'include'}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
)


def _errors(command: Sequence[str | Path], text: str | None = None) -> str:
    done = subprocess.run(
        [*map(str, command)], input=text, capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


def second_in_headers(sources: Path = SOURCES) -> str:
    """Return what the compiler says of all headers in one file, nothing where it takes them."""
    headers = sorted(path.relative_to(sources) for path in sources.rglob("*.h"))
    text = "".join(f'#include "{name}"\n' for name in headers if name.name != TORCH_HEADER)
    command = [compiler(), *_FLAGS, *_INCLUDES, f"-I{sources}", "-fsyntax-only", "-x", "c++", "-"]
    return _errors(command, text)


def _sources(sources: Path, *, with_torch: bool) -> list[Path]:
    """Return what is compiled alone: all but modules of Python, which take most of the time."""
    found = []
    for path in sorted(sources.rglob("*.cpp")):
        included = "".join(re.findall(r"^#include.*", path.read_text(), re.MULTILINE))
        module = re.search("pybind11|Python.h|python.h", included) or path == sources / LEFT_OUT
        if not module and (with_torch or not re.search(f"torch/|{TORCH_HEADER}", included)):
            found.append(path)
    return found


def second_in_sources(sources: Path = SOURCES) -> list[str]:
    """Return the functions of the namespace that objects define at two places of the sources."""
    places: dict[str, set[str]] = defaultdict(set)
    for source in _sources(sources, with_torch=True):
        made = kept_object(source, (*_FLAGS, *_PLACES, *_INCLUDES), sources)
        command = ["nm", "-lC", "--defined-only", made]
        said = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        for line in said.stdout.splitlines():
            # Capital letters are names that other objects see. An object of an unchanged source
            # may be that of another copy of the folder.
            found = re.fullmatch(r"\S+ [A-Zu] (.*fuseformer::.*?)\t.*?/csrc/(\S+)", line)
            if found and "(anonymous namespace)" not in found[1]:
                places[found[1]].add(os.path.normpath(found[2]))
    assert places, "nm names no place of any function: are objects compiled with -g1?"
    return [f"{name}: {sorted(at)}" for name, at in sorted(places.items()) if len(at) > 1]


def second_types(sources: Path = SOURCES) -> str:
    """Return what the linker says of types that two sources define differently.

    Sources that include PyTorch are left out.
    """
    compiled = _sources(sources, with_torch=False)
    objects = [kept_object(path, (*_FLAGS, *_TYPES), sources) for path in compiled]
    command = [compiler(), "-shared", "-O0", "-flto", "-Werror=odr", *objects, "-o", "/dev/null"]
    return _errors(command)
