"""What users install: built in every mode and way, installed elsewhere, called, removed.

`make test-packaging` runs it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from commands import run

from fuseformer._version import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("build_tools", "csrc", "kernels", "python", "tests", "bench")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FILES += ("Makefile", "constraints.txt", ".clang-format", ".pre-commit-config.yaml")

# It takes a quarter of an hour, and CI runs it beside the suite.
pytestmark = pytest.mark.skipif(
    os.environ.get("FUSEFORMER_PACKAGING") != "full", reason="`make test-packaging` runs it"
)


def copy_sources(folder, objects=True):
    """Return a copy of the sources, as of a clone; with objects of earlier builds or without."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "*.egg-info")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    cache = ROOT / "build/extension"
    if objects:
        # Objects that are built in the copy are there for the next one.
        cache.mkdir(parents=True, exist_ok=True)
        (folder / "build").mkdir()
        (folder / "build/extension").symlink_to(cache)
    return folder


def build_wheel(python, sources, out, mode, **changes):
    """Build a wheel with pip's isolation, as ``pip install .`` does."""
    command = (python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sources)
    changes = {"FUSEFORMER_BUILD": mode, "FUSEFORMER_ARCHS": "80"} | changes
    run(*command, cwd=out.parent, **changes)
    (wheel,) = out.glob("*.whl")
    return wheel


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def expected_members(mode, tag):
    """Every Python file and every file of data that git has, and what the mode adds."""
    found = ["fuseformer/_build.json", "fuseformer_command.py"]
    for folder, package in (("python/fuseformer", "fuseformer"), ("kernels", "fuseformer/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".html") or path.name == "py.typed":
                found.append(f"{package}/{path.relative_to(ROOT / folder)}")
    if mode != "none":
        found += ["fuseformer/_C.abi3.so", f"fuseformer/_host.{tag}.so"]
    info = f"fuseformer-{__version__}.dist-info"
    names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    return sorted(found + [f"{info}/{name}" for name in names])


CALLS = """
import json, sys
import fuseformer as ff, torch
from fuseformer import extension
assert "site-packages" in ff.__file__, ff.__file__
for name in ("triton", "transformers", "matplotlib"):
    assert name not in sys.modules, name
q = torch.randn(1, 2, 9, 64, requires_grad=True)
for backend in ("cpu", "reference", None):
    ff.attention(q, q, q, dropout_p=0.2, backend=backend).sum().backward()
for backend in ("cuda", "triton"):
    try: ff.attention(q, q, q, backend=backend)
    except ValueError as error: assert f"{backend!r} cannot serve" in str(error), error
    else: raise AssertionError(backend)
x = torch.randn(3, 16)
ff.feed_forward(x, torch.randn(32, 16), None, torch.randn(16, 32), None)
try:
    from fuseformer import _host
    tiles = len(_host.tiles())
except ImportError:
    tiles = 0
built = extension.build()
print(json.dumps([built["mode"], built["architectures"], extension.problem(), tiles]))
"""


def check_installation(python, mode, folder):
    """Call every backend that can run, from a folder that has nothing to do with the project."""
    said = run(python, "-c", CALLS, cwd=folder).stdout
    built, architectures, problem, tiles = json.loads(said.splitlines()[-1])
    assert built == mode
    assert architectures == (["80"] if mode == "cuda" else [])
    assert (problem is None) == (mode != "none")
    assert (tiles > 10) == (mode != "none")
    assert (
        f"fuseformer {__version__}" in run(python.parent / "fuseformer", "info", cwd=folder).stdout
    )
    doctor = run(python.parent / "fuseformer", "doctor", cwd=folder).stdout
    assert len(re.findall(r"^cpu +(cpu|reference) +ok", doctor, re.MULTILINE)) == 2


def installed_files(python):
    root = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    return {*root.rglob("*fuseformer*"), *python.parent.glob("*fuseformer*")}


def uninstall(python):
    run(python, "-m", "pip", "uninstall", "--yes", "fuseformer")
    left = {p for p in installed_files(python) if "__pycache__" not in p.parts}
    assert not left


def environment(folder, *packages):
    """Make an environment with these packages and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(*pip, *packages)
    return python


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The Python of an environment that has torch and numpy, where wheels are installed."""
    return environment(tmp_path_factory.mktemp("runtime"), "torch", "numpy")


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """The Python of an environment that has torch, and the CUDA compiler of the package index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "build_tools"))
        from toolchain import CUDA_REQUIREMENTS
    return environment(tmp_path_factory.mktemp("builder"), "torch", *CUDA_REQUIREMENTS)


@pytest.fixture(scope="module")
def wheels(builder, tmp_path_factory):
    """A wheel of each mode, built with pip's isolation."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    found = {}
    for mode in ("none", "cpu", "cuda"):
        (folder / mode).mkdir()
        found[mode] = build_wheel(builder, sources, folder / mode, mode, MAX_JOBS="2")
    return found


@pytest.mark.parametrize("mode", ["none", "cpu", "cuda"])
def test_a_wheel_holds_what_it_should_and_runs_elsewhere(mode, wheels, runtime, tmp_path):
    wheel = wheels[mode]
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tag = f"{version}-{version}-linux_{os.uname().machine}" if mode != "none" else "py3-none-any"
    assert wheel.name == f"fuseformer-{__version__}-{tag}.whl"
    assert wheel.stat().st_size <= 20 << 20
    host = f"cpython-{version[2:]}-{os.uname().machine}-linux-gnu"
    assert members(wheel) == expected_members(mode, host)
    before = run(runtime, "-m", "pip", "freeze").stdout
    run(
        runtime,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--find-links",
        wheel.parent,
        "fuseformer",
    )
    check_installation(runtime, mode, tmp_path)
    uninstall(runtime)
    assert run(runtime, "-m", "pip", "freeze").stdout == before  # torch is who it was


def test_pip_install_of_the_sources_takes_what_there_is(runtime, tmp_path):
    """No toolkit where CUDA_HOME says: the library for CPUs is built, and it is said why."""
    (tmp_path / "sources").mkdir()
    sources = copy_sources(tmp_path / "sources")
    before = run(runtime, "-m", "pip", "freeze").stdout
    run(runtime, "-m", "pip", "install", "--no-deps", sources, cwd=tmp_path, CUDA_HOME="/nowhere")
    check_installation(runtime, "cpu", tmp_path)
    info = run(runtime.parent / "fuseformer", "info", cwd=tmp_path).stdout
    assert "not cuda: no nvcc with libcudart_static.a was found in CUDA_HOME=/nowhere" in info
    uninstall(runtime)
    assert run(runtime, "-m", "pip", "freeze").stdout == before


@pytest.mark.parametrize("mode", ["none", "cpu"])
def test_an_editable_installation_follows_its_sources(mode, runtime, tmp_path):
    (tmp_path / "sources").mkdir()
    sources = copy_sources(tmp_path / "sources")
    command = (runtime, "-m", "pip", "install", "--no-deps", "--editable", sources)
    run(*command, cwd=tmp_path, FUSEFORMER_BUILD=mode)
    code = (
        "import fuseformer.extension as e, fuseformer.kernels as k\n"
        "print(e.build()['mode'], e.problem() is None, k.__file__)"
    )
    said = run(runtime, "-c", code, cwd=tmp_path).stdout.split()
    assert said == [mode, str(mode != "none"), str(sources / "kernels/__init__.py")]
    init = sources / "python/fuseformer/__init__.py"
    init.write_text(init.read_text() + "\nCHANGED = 7\n")
    code = "import fuseformer; print(fuseformer.CHANGED)"
    assert run(runtime, "-c", code, cwd=tmp_path).stdout.strip() == "7"
    uninstall(runtime)


def test_the_sdist_is_whole_and_installs(runtime, tmp_path):
    """``python -m build``: in an environment of its own, which is given torch's headers."""
    (tmp_path / "sources").mkdir()
    sources = copy_sources(tmp_path / "sources")
    build = (sys.executable, "-m", "build", "--outdir", tmp_path / "dist", sources)
    run(*build, cwd=tmp_path, FUSEFORMER_BUILD="none")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(p.relative_to(ROOT))
        for folder in SOURCES
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
        and p.suffix not in (".pyc", ".so")
        and p.name != "_build.json"
        and "egg-info" not in str(p)
    }
    assert wanted | set(FILES) <= names
    assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc"))]
    run(sys.executable, "-m", "twine", "check", "--strict", *(tmp_path / "dist").iterdir())
    install = (runtime, "-m", "pip", "install", "--no-deps", sdist)
    run(*install, cwd=tmp_path, FUSEFORMER_BUILD="cpu")
    check_installation(runtime, "cpu", tmp_path)
    uninstall(runtime)


@pytest.mark.parametrize("mode", ["none", "cpu", "cuda"])
def test_two_builds_are_the_same_byte_by_byte(mode, wheels, builder, tmp_path):
    """The second one elsewhere, from nothing."""
    (tmp_path / "elsewhere/sources").mkdir(parents=True)
    sources = copy_sources(tmp_path / "elsewhere/sources", objects=False)
    (tmp_path / "out").mkdir()
    again = build_wheel(builder, sources, tmp_path / "out", mode, MAX_JOBS="2")
    assert again.name == wheels[mode].name
    assert again.read_bytes() == wheels[mode].read_bytes()


def interpreters():
    """Python -> its path, of those from 3.10 to 3.13 that are on this machine."""
    found = {}
    for minor in range(10, 14):
        places = [shutil.which(f"python3.{minor}")]
        places += sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for place in filter(None, places):
            code = "import sys; print(sys.version_info[:2])"
            done = subprocess.run([place, "-c", code], capture_output=True, text=True, check=False)
            if done.stdout.strip() == f"(3, {minor})":
                found[f"3.{minor}"] = str(place)
                break
    return found


@pytest.mark.parametrize("version", interpreters())
def test_every_python_gets_the_same_library(version, wheels, tmp_path):
    """Only `_host` is made anew; `_C` is linked from the objects that are there."""
    run(interpreters()[version], "-m", "venv", tmp_path / "environment")
    python = tmp_path / "environment/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "setuptools>=77", "pybind11")
    (tmp_path / "sources").mkdir()
    (tmp_path / "out").mkdir()
    sources = copy_sources(tmp_path / "sources")
    # Headers are those of any Python's torch: this one's are put where its own would be.
    site = next(tmp_path.glob("environment/lib/python*/site-packages"))
    (site / "torch").symlink_to(Path(torch.__file__).parent)
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir")
    run(python, *command, tmp_path / "out", sources, FUSEFORMER_BUILD="cpu")
    (wheel,) = (tmp_path / "out").glob("*.whl")
    (site / "torch").unlink()
    with zipfile.ZipFile(wheel) as mine, zipfile.ZipFile(wheels["cpu"]) as other:
        assert mine.read("fuseformer/_C.abi3.so") == other.read("fuseformer/_C.abi3.so")
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    (tmp_path / "alone").mkdir()
    for library in (site / "fuseformer").glob("*.so"):
        shutil.copy(library, tmp_path / "alone")
    # Without torch: it is no version's own, and what it wants of Python every version has.
    said = run(python, "-c", "import _host; print(len(_host.tiles()))", cwd=tmp_path / "alone")
    assert int(said.stdout) > 10
    wanted = run("nm", "-D", "--undefined-only", tmp_path / "alone/_C.abi3.so").stdout
    assert set(re.findall(r" U (_?Py\w+)", wanted)) == {"PyModule_Create2"}


def test_the_wheel_for_the_usual_architectures_is_small_and_spills_nothing(builder, tmp_path):
    (tmp_path / "sources").mkdir()
    (tmp_path / "wheel").mkdir()
    sources = copy_sources(tmp_path / "sources")
    wheel = build_wheel(builder, sources, tmp_path / "wheel", "cuda", FUSEFORMER_ARCHS="")
    assert wheel.stat().st_size <= 20e6
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo("fuseformer/_C.abi3.so").file_size <= 15e6
        built = json.loads(archive.read("fuseformer/_build.json"))
    assert built["architectures"] == ["80+PTX", "90", "100", "120"]
    assert {kernel["architecture"] for kernel in built["kernels"]} == {80, 90, 100, 120}
    assert built["spills"] == []


def test_what_needs_newer_systems_is_known(wheels, tmp_path):
    """Built on a system with glibc 2.34 or newer the library wants that, of dlopen and threads,
    which moved into libc then: the wheels of a release are built on 2.28."""
    with zipfile.ZipFile(wheels["cuda"]) as archive:
        archive.extract("fuseformer/_C.abi3.so", tmp_path)
    said = run("objdump", "-T", tmp_path / "fuseformer/_C.abi3.so").stdout
    newer = {
        name
        for version, name in re.findall(r"\(GLIBC_2\.(\d+)\)\s+(\S+)", said)
        if int(version) > 28
    }
    # The one name besides that libstdc++ of such a system asks for.
    moved = ("pthread_", "sem_", "shm_", "dl", "__libc_single_threaded")
    assert all(name.startswith(moved) for name in newer), newer
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBCXX_([\d.]+)", said)}
    assert max(versions) <= (3, 4, 29)
