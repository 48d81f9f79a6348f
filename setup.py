"""Builds the package, with its CUDA C++ kernels where that is possible or asked for.

FUSEFORMER_BUILD   auto (default): cuda where nvcc and torch are found, else none
                   none: Python and Triton alone
                   cuda: with the CUDA C++ kernels, or an error that says what is missing
FUSEFORMER_ARCHS   architectures, by commas, "+PTX" for code that newer GPUs compile themselves
MAX_JOBS           compilers at once; as many as there are processors unless given, at most 8

torch is not imported: its headers are enough. Objects are kept under ``build/extension`` by what
goes into them, so that a changed kernel compiles only itself.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CACHE = ROOT / "build" / "extension"
DEFAULT_ARCHS = "80,90,100,120+PTX"
KNOWN_ARCHS = ("80", "86", "87", "89", "90", "100", "103", "120", "121")
LEAST_TORCH = (2, 10)
LEAST_CUDA = (12, 8)  # the first with sm_120
HOST_SOURCES = (
    "library.cpp",
    "attention/attention.cpp",
    "attention/decode.cpp",
    "feed_forward/feed_forward.cpp",
    "feed_forward/linear.cpp",
    "feed_forward/backward.cpp",
)
KERNEL_SOURCES = tuple(
    f"{which}_{dtype}.cu"
    for which in (
        "attention/backward",
        "attention/forward",
        "attention/decode",
        "feed_forward/forward",
        "feed_forward/linear",
        "feed_forward/backward",
    )
    for dtype in ("bf16", "fp16")
)
# The oldest torch whose stable ABI is used.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"


class Missing(Exception):
    """What a build needs and this machine has not, with the remedy."""


def environment_packages():
    """Return where packages are: in pip's build isolation, those of the outer environment."""
    return [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]


def torch_include():
    """Return the include folder of the torch that is installed."""
    roots = [path / "torch" for path in environment_packages()]
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin:
        roots.append(Path(found.origin).parent)
    for root in roots:
        version = root / "version.py"
        said = (
            re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
            if version.exists()
            else None
        )
        if said and tuple(map(int, said.groups())) >= LEAST_TORCH:
            return root / "include"
    raise Missing(
        "no torch of 2.10 or newer was found: pip install 'torch>=2.10', or build with "
        "--no-build-isolation where it is"
    )


def cuda_home():
    """Return the CUDA toolkit, whose nvcc and static runtime are there, and its version."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), *(p / "nvidia/cu13" for p in environment_packages())]
    places += [Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    for home in (Path(place) for place in places if place):
        libraries = [home / name for name in ("lib64", "lib")]
        if (home / "bin/nvcc").exists() and any(
            (p / "libcudart_static.a").exists() for p in libraries
        ):
            try:
                said = run([home / "bin/nvcc", "--version"])
            except (OSError, subprocess.CalledProcessError) as error:
                raise Missing(f"{home}/bin/nvcc does not run: {error}") from error
            version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", said).groups()))
            if version < LEAST_CUDA:
                raise Missing(f"{home} is CUDA {version[0]}.{version[1]}; 12.8 or newer is needed")
            return home, version
    raise Missing(
        "no nvcc with libcudart_static.a was found in CUDA_HOME, this environment, PATH or "
        "/usr/local/cuda: pip install 'fuseformer[cuda]' brings both"
    )


def compiler():
    """Return the C++ compiler."""
    named = os.environ.get("CXX") or "g++"
    found = shutil.which(named)
    if found is None:
        raise Missing(f"no C++ compiler {named!r} was found: install g++, or name one in CXX")
    return found


def architectures():
    """Return the architectures asked for. Raises `SystemExit` for one that is not known."""
    asked = os.environ.get("FUSEFORMER_ARCHS", DEFAULT_ARCHS).split(",")
    for name in asked:
        if name.removesuffix("+PTX") not in KNOWN_ARCHS:
            raise SystemExit(
                f"FUSEFORMER_ARCHS: got {name!r}, expected some of {', '.join(KNOWN_ARCHS)}, "
                "each with or without +PTX, by commas"
            )
    return asked


def run(command):
    """Run a command and return what it said. Raises `CalledProcessError`, its output in it."""
    return subprocess.run(
        [*map(str, command)],
        text=True,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


def jobs():
    """Return how many compilers may run at once. Raises `SystemExit` for no number."""
    asked = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    if not asked.isdecimal() or int(asked) < 1:
        raise SystemExit(f"MAX_JOBS: got {asked!r}, expected a number of compilers, 1 or more")
    return int(asked)


def build_step(what, command):
    """Run a compiler or linker and return what it said. Raises `SystemExit`, having shown that."""
    try:
        return run(command)
    except subprocess.CalledProcessError as error:
        print(error.stdout, file=sys.stderr)
        raise SystemExit(f"fuseformer: {what} failed") from error


def decide():
    """Return the mode, and what its build uses. Raises `SystemExit` where it cannot be had."""
    asked = os.environ.get("FUSEFORMER_BUILD", "auto")
    if asked not in ("auto", "none", "cuda"):
        raise SystemExit(f"FUSEFORMER_BUILD: got {asked!r}, expected auto, none or cuda")
    if asked == "none":
        return "none", {}
    try:
        home, version = cuda_home()
        found = {
            "cuda_home": home,
            "cuda": ".".join(map(str, version)),
            "torch_include": torch_include(),
            "cxx": compiler(),
            "archs": architectures(),
        }
        if importlib.util.find_spec("pybind11") is None:
            raise Missing("pybind11 was not found: pip install pybind11")
    except Missing as missing:
        if asked == "cuda":
            raise SystemExit(f"FUSEFORMER_BUILD=cuda: {missing}") from missing
        print(f"fuseformer: built without CUDA C++ kernels: {missing}", file=sys.stderr)
        return "none", {}
    return "cuda", found


MODE, FOUND = decide()


def sources_text():
    """Return all headers: any of them may go into an object."""
    files = sorted((ROOT / "csrc").rglob("*.h"))
    return [
        (str(p.relative_to(ROOT)), p.read_text())
        for p in files
        if "emulator" not in p.relative_to(ROOT).parts
    ]


def compiled(source, command):
    """Return the object of a source, and what its compiler said, made once for the same inputs."""
    path = ROOT / "csrc" / source
    key = hashlib.sha256(
        repr((path.read_text(), sources_text(), [*map(str, command)], FOUND["cuda"])).encode()
    ).hexdigest()[:24]
    target = CACHE / f"{key}-{path.stem}.o"
    log = target.with_suffix(".log")
    if not log.exists():
        # What is interrupted leaves parts, which nobody takes for the whole.
        part, said = (target.with_suffix(f".{os.getpid()}.{kind}") for kind in ("part", "said"))
        said.write_text(build_step(f"compiling {source}", [*command, "-c", path, "-o", part]))
        part.replace(target)
        said.replace(log)
    return target, log.read_text()


def resources(log):
    """Return registers and spilled bytes of every kernel that ptxas spoke of."""
    found = []
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame.*?Used (\d+)"
    )
    for name, arch, stack, registers in re.findall(pattern, log, re.DOTALL):
        kernel = re.search(r"attention_(\w+?)_kernel", name)
        config = re.search(r"(Small)?\w+?(?:Config|Traits)INS_\d+(Bfloat16|Half)ELi(\d+)E", name)
        if kernel and config:
            found.append(
                {
                    "kernel": kernel[1] + (" small" if "SmallBackward" in name else ""),
                    "dtype": {"Bfloat16": "bf16", "Half": "fp16"}[config[2]],
                    "head_dim": int(config[3]),
                    "dropout": name.count("Lb1E") > 0,
                    "architecture": int(arch),
                    "registers": int(registers),
                    "stack_bytes": int(stack),
                }
            )
    return found


class BuildExtension(build_ext):
    """Compiles and links `_C` by hand; `_host` is an ordinary extension."""

    def build_extension(self, ext):
        """Compile the sources of `_C` that have changed, and link it."""
        if ext.name != "fuseformer._C":
            self.force = True  # it is small, and setuptools knows neither its headers nor macros
            super().build_extension(ext)
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        home, archs = FOUND["cuda_home"], FOUND["archs"]
        common = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DFUSEFORMER_CUDA", TARGET]
        includes = [FOUND["torch_include"], sysconfig.get_path("include"), home / "include"]
        host = [FOUND["cxx"], *common, *(f"-I{path}" for path in includes)]
        codes = []
        for name in archs:
            number = name.removesuffix("+PTX")
            kinds = [f"sm_{number}"] + ([f"compute_{number}"] if name.endswith("+PTX") else [])
            codes += ["-gencode", f"arch=compute_{number},code=[{','.join(kinds)}]"]
        device = [home / "bin/nvcc", "-ccbin", FOUND["cxx"], "-O3", "-std=c++17", *codes]
        device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
        device += ["-Xptxas", "-v"]
        work = [(name, device) for name in KERNEL_SOURCES] + [(name, host) for name in HOST_SOURCES]
        print(f"fuseformer: {len(work)} sources for {', '.join(archs)}", file=sys.stderr)
        with ThreadPoolExecutor(jobs()) as pool:
            made = list(pool.map(lambda item: compiled(*item), work))

        # The library only has to say that it needs libtorch, which is loaded by then.
        stub = CACHE / "stub"
        stub.mkdir(exist_ok=True)
        (stub / "empty.cpp").write_text("")
        stubbed = [FOUND["cxx"], "-shared", "-Wl,-soname,libtorch.so", stub / "empty.cpp"]
        build_step("linking", [*stubbed, "-o", stub / "libtorch.so"])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = next(
            p for p in (home / "lib64", home / "lib") if (p / "libcudart_static.a").exists()
        )
        command = [FOUND["cxx"], "-shared", *(path for path, _ in made)]
        command += [f"-L{stub}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        command += [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        command += ["-Wl,--exclude-libs,ALL", "-Wl,--no-undefined-version", "-s"]
        build_step("linking", [*command, "-o", target])
        record(target.parent, [row for _, log in made for row in resources(log)])

    def copy_extensions_to_source(self):
        """Copy what was built beside the sources, its record too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "fuseformer/_build.json"
        shutil.copyfile(built, ROOT / "python/fuseformer/_build.json")


def record(folder, kernels):
    """Write what was built beside the package."""
    folder.mkdir(parents=True, exist_ok=True)
    built = {"mode": MODE, "architectures": FOUND.get("archs", []), "cuda": FOUND.get("cuda")}
    (folder / "_build.json").write_text(json.dumps(built | {"kernels": kernels}, indent=1) + "\n")


class BuildPython(build_py):
    """Records a build without extensions too."""

    def run(self):
        """Copy the package, and write the record where no extension does."""
        super().run()
        if MODE == "none":
            editable = self.editable_mode
            record(Path("python" if editable else self.build_lib) / "fuseformer", [])

    def get_outputs(self, include_bytecode=True):
        """Name the record among what is installed."""
        extra = [] if self.editable_mode else [str(Path(self.build_lib) / "fuseformer/_build.json")]
        return super().get_outputs(include_bytecode) + extra


def extensions():
    """Return the extensions of the mode."""
    if MODE == "none":
        return []
    import pybind11

    names = ",".join(FOUND["archs"])
    return [
        Extension("fuseformer._C", [], py_limited_api=True),
        Extension(
            "fuseformer._host",
            ["csrc/host.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[("FUSEFORMER_ARCHS", f'"{names}"')],
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
        ),
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
