"""Compiles and links the libraries `_C` and `_host`.

Objects are kept under ``build/extension`` by what goes into them, so that a changed kernel compiles
only itself, and all Pythons share them.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolchain import Toolchain, cuda_libraries, jobs

ROOT = Path(__file__).parents[1].resolve()
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "extension"
CPU_SOURCES = ("module.cpp", "cpu/dropout_mask.cpp", "cpu/library.cpp")
HOST_MODULE_SOURCE = "host.cpp"  # of `_host`, a library by itself
CUDA_SOURCES = (
    "library.cpp",
    "attention/attention.cpp",
    "attention/decode.cpp",
    "attention/library.cpp",
    "feed_forward/backward.cpp",
    "feed_forward/feed_forward.cpp",
    "feed_forward/few_rows.cpp",
    "feed_forward/gated.cpp",
    "feed_forward/library.cpp",
    "feed_forward/linear.cpp",
)
KERNEL_SOURCES = tuple(
    f"{which}_{dtype}.cu"
    for which in (
        "attention/backward",
        "attention/forward",
        "attention/decode",
        "feed_forward/backward",
        "feed_forward/forward",
        "feed_forward/few_rows",
        "feed_forward/gated",
        "feed_forward/linear",
    )
    for dtype in ("bf16", "fp16")
)
#: Files of a toolkit that decide what an object for GPUs is.
DEVICE_COMPILER = (
    "bin/nvcc",
    "bin/nvcc.profile",
    "bin/cudafe++",
    "bin/ptxas",
    "bin/fatbinary",
    "nvvm/bin/cicc",
    "nvvm/libdevice/libdevice.10.bc",
    "include/cuda_runtime_api.h",
)
# The oldest torch whose stable ABI is used.
_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"


def run(what: str, command: list) -> str:
    """Run a compiler or linker and return what it said. Raises `SystemExit`, having shown that."""
    done = subprocess.run(
        [*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print(f"{' '.join(map(str, command))}\n{done.stdout}", file=sys.stderr)
        raise SystemExit(f"fuseformer: {what} failed")
    return done.stdout


def flags(name: str) -> list[str]:
    """Return the arguments of a compiler or linker that a variable of the environment has."""
    return shlex.split(os.environ.get(name, ""))


def _texts(source: Path) -> dict[str, str]:
    """Return a source and the project's headers that it includes, others through them too."""
    found: dict[str, str] = {}
    left = [source]
    while left:
        path = left.pop()
        name = str(path.relative_to(SOURCES))
        if name not in found:
            found[name] = path.read_text()
            named = re.findall(r'^#include "([^"]+)"', found[name], re.MULTILINE)
            left += [(path.parent / include).resolve() for include in named]
    return dict(sorted(found.items()))


def _make_cache() -> None:
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=CACHE).close()
    except OSError as error:
        raise SystemExit(
            f"fuseformer: {CACHE} cannot be written ({error.strerror}): build from a copy of the "
            "sources in a folder that can"
        ) from error


def _digest(home: Path) -> str:
    """Return what tells the compilers for GPUs of two toolkits apart; some say no version."""
    digest = hashlib.sha256()
    for path in (home / name for name in DEVICE_COMPILER):
        if path.exists():
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Library:
    """The library of one toolchain."""

    def __init__(self, tools: Toolchain) -> None:
        self.tools = tools
        # What depends on where the sources and headers lie stays out of the objects.
        include = tools.torch_include
        self.paths = [f"-ffile-prefix-map={SOURCES}=csrc", f"-ffile-prefix-map={include}=torch"]
        self.device_compiler = _digest(tools.cuda_home) if tools.cuda_home is not None else ""

    @property
    def host_command(self) -> list:
        """How a C++ source is compiled."""
        includes = [self.tools.torch_include, sysconfig.get_path("include")]
        if self.tools.cuda_home is not None:
            includes.append(self.tools.cuda_home / "include")
        return [
            *(*self.tools.cxx, "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", _TARGET),
            *self.paths,
            *(f"-I{path}" for path in includes),
            *flags("CXXFLAGS"),
        ]

    @property
    def device_command(self) -> list:
        """How a CUDA source is compiled, for all architectures at once.

        All binaries are made from the PTX of the least architecture, whose instructions are all
        that the kernels use: to make the PTX takes most of the time.
        """
        assert self.tools.cuda_home is not None
        numbers = [name.removesuffix("+PTX") for name in self.tools.architectures]
        least = min(numbers, key=int)
        kinds: dict[str, list[str]] = {least: [f"sm_{number}" for number in numbers]}
        for name, number in zip(self.tools.architectures, numbers, strict=True):
            if name != number:
                kinds.setdefault(number, []).append(f"compute_{number}")
        codes: list[str] = []
        for number, wanted in kinds.items():
            codes += ["-gencode", f"arch=compute_{number},code=[{','.join(wanted)}]"]
        compiler, arguments = self.tools.host_compiler
        return [
            *(self.tools.cuda_home / "bin/nvcc", "-ccbin", compiler, "-O3", "-std=c++17", *codes),
            *(f"-Xcompiler={word}" for word in (*arguments, "-fPIC", "-fvisibility=hidden")),
            *(f"-Xcompiler={word}" for word in self.paths),
            *("-Xfatbin=-compress-all", "-Xptxas", "-v"),
        ]

    @property
    def _host_module_command(self) -> list:
        """How the source of `_host` is compiled: for this Python alone, without torch or CUDA."""
        import pybind11

        names, include = ",".join(self.tools.architectures), pybind11.get_include()
        return [
            *(*self.tools.cxx, "-O2", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
            f'-DFUSEFORMER_ARCHS="{names}"',
            *(f"-I{include}", f"-I{sysconfig.get_path('include')}"),
            *(f"-ffile-prefix-map={SOURCES}=csrc", f"-ffile-prefix-map={include}=pybind11"),
            *flags("CXXFLAGS"),
        ]

    def build(self, target: Path) -> dict[str, list[dict]]:
        """Write the library, and return what was made of its kernels, as `record` writes it.

        Raises `SystemExit`, having shown what the compiler said.
        """
        _make_cache()
        work = [(name, self.host_command) for name in CPU_SOURCES]
        work.insert(0, (HOST_MODULE_SOURCE, self._host_module_command))
        if self.tools.mode == "cuda":
            work += [(name, self.host_command) for name in CUDA_SOURCES]
            # First what takes longest.
            work = [(name, self.device_command) for name in KERNEL_SOURCES] + work
        with ThreadPoolExecutor(jobs()) as pool:
            made = list(pool.map(lambda item: self._compiled(*item), work))
        named = zip(work, made, strict=True)
        self._link(target, [path for (name, _), (path, _) in named if name != HOST_MODULE_SOURCE])
        logs = "".join(log for _, log in made)
        return {"kernels": resources(logs), "spills": spills(logs)}

    def build_host_module(self, target: Path) -> None:
        """Write `_host`, from the object that `build` has made beside those of the library.

        Raises `SystemExit`, having shown what the compiler said.
        """
        _make_cache()
        path, _ = self._compiled(HOST_MODULE_SOURCE, self._host_module_command)
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.tools.cxx, "-shared", path, "-s", *flags("LDFLAGS"), "-o", target]
        run("linking", command)

    def _without_places(self, command: list) -> list[str]:
        """Return a command that is the same wherever the sources, torch, CUDA and Python lie."""
        import pybind11

        places = {
            pybind11.get_include(): f"pybind11 {pybind11.__version__}",
            SOURCES: "csrc",
            self.tools.torch_include: "torch",
            self.tools.cuda_home: "cuda",
            Path(sysconfig.get_path("include")): "python",
        }
        words = [str(word) for word in command]
        # A place may lie in another.
        for place, name in sorted(places.items(), key=lambda item: -len(str(item[0]))):
            if place is not None:
                words = [word.replace(str(place), name) for word in words]
        return words

    def _key(self, source: str, command: list) -> str:
        """Return a name for what goes into the object of a source."""
        path = SOURCES / source
        tools = [self.tools.cxx_version]
        if source == HOST_MODULE_SOURCE:  # the others use Python's limited interface alone
            tools += [sysconfig.get_config_var("SOABI"), sys.version]
        else:
            tools += [self.tools.torch_version, self.tools.cuda]
        if path.suffix == ".cu":
            # Arguments that nvcc takes from the environment, by itself.
            tools += [os.environ.get(f"NVCC_{where}_FLAGS", "") for where in ("PREPEND", "APPEND")]
            tools.append(self.device_compiler)
        text = repr((_texts(path), self._without_places(command), tools))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _compiled(self, source: str, command: list) -> tuple[Path, str]:
        """Return the object of a source, and what its compiler said, made once for one input."""
        path = SOURCES / source
        target = CACHE / f"{self._key(source, command)}-{path.stem}.o"
        log = target.with_suffix(".log")
        if not log.exists():
            # What is interrupted leaves parts, which nobody takes for the whole.
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="part-") as folder:
                part, said = Path(folder) / "object", Path(folder) / "log"
                said.write_text(run(f"compiling {source}", [*command, "-c", path, "-o", part]))
                part.replace(target)
                said.replace(log)
        return target, log.read_text()

    def _link(self, target: Path, objects: list[Path]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = [*self.tools.cxx, "-shared"]
        with tempfile.TemporaryDirectory() as folder:
            # The library only has to say that it needs libtorch, which is loaded by then.
            empty, stub = Path(folder) / "empty.cpp", Path(folder) / "libtorch.so"
            empty.touch()
            run("linking", [*shared, "-Wl,-soname,libtorch.so", empty, "-o", stub])
            command = [*shared, *objects, f"-L{folder}", "-Wl,--no-as-needed", "-ltorch"]
            command += ["-Wl,--as-needed"]
            if self.tools.cuda_home is not None:
                command += [f"-L{cuda_libraries(self.tools.cuda_home)}", "-lcudart_static"]
                command += ["-ldl", "-lrt", "-lpthread"]
            command += ["-Wl,--exclude-libs,ALL", "-s", *flags("LDFLAGS"), "-o", target]
            run("linking", command)


#: What people call the kernels that have tiles, by the names of their functions.
_KERNELS = {
    "attention_forward": "forward",
    "attention_backward": "backward",
    "attention_backward_wide": "backward",
    "attention_decode": "decode",
    "feed_forward_forward": "feed-forward",
    "feed_forward_backward": "feed-forward backward",
    "linear": "linear",
    "few_rows_hidden": "few-rows hidden",
    "few_rows_output": "few-rows output",
}
_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def resources(log: str) -> list[dict]:
    """Return registers and spilled bytes of every kernel with tiles that ptxas spoke of."""
    found = []
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame.*?Used (\d+)"
    )
    parts = r"fuseformer\d+(\w+?)_kernelINS_\d+(Small)?[A-Za-z]+INS_\d+(Bfloat16|Half)ELi(\d+)E"
    for name, arch, stack, registers in re.findall(pattern, log, re.DOTALL):
        said = re.search(parts, name)
        if said is None or said[1] not in _KERNELS:
            continue
        number = re.search(r"10ActivationE(\d)E", name)
        activation = _ACTIVATIONS[int(number[1])] if number else None
        if "SmoothActivation" in name:  # chosen when it runs
            activation = "other"
        found.append(
            {
                "kernel": _KERNELS[said[1]] + (" small" if said[2] else ""),
                "dtype": {"Bfloat16": "bf16", "Half": "fp16"}[said[3]],
                "size": int(said[4]),
                "activation": activation,
                "dropout": "Lb1E" in name,
                "architecture": int(arch),
                "registers": int(registers),
                "stack_bytes": int(stack),
            }
        )
    return found


def spills(log: str) -> list[dict]:
    """Return the kernels, of any kind, whose registers did not suffice, by their linker's names."""
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?"
        r"\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    return [
        {"kernel": name, "architecture": int(arch), "bytes": int(stores)}
        for name, arch, stores, loads in re.findall(pattern, log, re.DOTALL)
        if int(stores) or int(loads)
    ]


def record(folder: Path, tools: Toolchain, made: dict[str, list[dict]]) -> None:
    """Write what was built beside the package."""
    folder.mkdir(parents=True, exist_ok=True)
    built = {
        "mode": tools.mode,
        "refused": tools.refused,
        "architectures": tools.architectures,
        "cuda": tools.cuda,
        "torch": tools.torch_version or None,
        "compiler": tools.cxx_version or None,
    } | made
    (folder / "_build.json").write_text(json.dumps(built, indent=1) + "\n")
