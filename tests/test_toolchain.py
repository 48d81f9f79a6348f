"""What a build finds on a machine, and what it says of what will not do."""

import itertools
import platform
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    import toolchain

    for name in ("FUSEFORMER_BUILD", "FUSEFORMER_ARCHS", "CXX", "CUDA_HOME", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return toolchain


def torch_in(folder, version):
    (folder / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (folder / "torch/include/torch/csrc/stable/library.h").touch()
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    return folder


def test_a_torch_that_is_too_old_is_named_and_passed_over(toolchain, monkeypatch, tmp_path):
    old, new = torch_in(tmp_path / "old", "2.9.1+cpu"), torch_in(tmp_path / "new", "2.10.0")
    monkeypatch.setattr(toolchain, "package_folders", lambda: [old])
    with pytest.raises(
        toolchain.Missing, match=r"torch 2\.9\.1\+cpu in .* is too old: pip install"
    ):
        toolchain.find_torch()
    monkeypatch.setattr(toolchain, "package_folders", lambda: [old, new])
    assert toolchain.find_torch() == (new / "torch/include", "2.10.0")
    (new / "torch/include/torch/csrc/stable/library.h").unlink()  # headers are part of it
    monkeypatch.setattr(toolchain, "package_folders", lambda: [new])
    with pytest.raises(toolchain.Missing, match="no torch was found"):
        toolchain.find_torch()


def test_a_compiler_may_have_arguments_and_a_launcher(toolchain, monkeypatch, tmp_path):
    launcher = tmp_path / "ccache"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} g++ -m64")
    words, version = toolchain.find_compiler()
    assert words == (str(launcher), "g++", "-m64")
    assert "g++" in version
    # nvcc is given the compiler, and its arguments by themselves.
    compiler, arguments = toolchain.Toolchain("cuda", cxx=words).host_compiler
    assert Path(compiler).name == "g++"
    assert arguments == ["-m64"]


def test_a_toolkit_that_is_named_serves_or_fails(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.Missing, match=r"was found in CUDA_HOME=.*pip install"):
        toolchain.find_cuda()


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ((12, 4), ("80+PTX", "90")),
        ((12, 8), ("80+PTX", "90", "100", "120")),
        ((13, 0), ("80+PTX", "90", "100", "120")),
    ],
)
def test_the_usual_architectures_are_those_that_the_toolkit_knows(
    toolchain, version, architectures
):
    assert toolchain.find_architectures(version) == architectures


def test_architectures_that_are_named_are_taken_as_they_are(toolchain, monkeypatch):
    monkeypatch.setenv("FUSEFORMER_ARCHS", "80,86+PTX")
    assert toolchain.find_architectures((12, 4)) == ("80", "86+PTX")
    monkeypatch.setenv("FUSEFORMER_ARCHS", "80,121")
    with pytest.raises(SystemExit, match=r"got '121', expected some of .*CUDA 12.8"):
        toolchain.find_architectures((12, 8))


@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        (("80+PTX", "90", "100"), ["arch=compute_80,code=[sm_80,sm_90,sm_100,compute_80]"]),
        (("100", "90"), ["arch=compute_90,code=[sm_100,sm_90]"]),
        (
            ("86", "120+PTX"),
            ["arch=compute_86,code=[sm_86,sm_120]", "arch=compute_120,code=[compute_120]"],
        ),
    ],
)
def test_ptx_is_made_once_for_all_binaries(toolchain, architectures, codes):
    import library

    tools = toolchain.Toolchain(
        "cuda", cxx=("g++",), cuda_home=Path("/cuda"), architectures=architectures
    )
    command = library.Library(tools).device_command
    given = [after for word, after in itertools.pairwise(command) if word == "-gencode"]
    assert given == codes


def test_an_object_is_that_of_its_compiler_and_its_arguments(toolchain, tmp_path):
    import library

    def keys(changed_file=None, **variables):
        home = tmp_path / "home"
        for name in library.DEVICE_COMPILER:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("another" if name == changed_file else "one")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            tools = toolchain.Toolchain(
                "cuda",
                cxx=("g++",),
                torch_include=Path("/torch"),
                cuda_home=home,
                architectures=("80",),
            )
            built = library.Library(tools)
            return (
                built._key("attention/forward_bf16.cu", built.device_command),
                built._key("library.cpp", built.host_command),
                built._key("host.cpp", built._host_module_command),
            )

    usual = keys()
    assert keys() == usual

    def changed(*arguments, **variables):
        pairs = zip(keys(*arguments, **variables), usual, strict=True)
        return tuple(one != other for one, other in pairs)

    assert {"bin/nvcc", "bin/ptxas", "nvvm/bin/cicc"} <= set(library.DEVICE_COMPILER)
    for name in library.DEVICE_COMPILER:
        assert changed(name) == (True, False, False), name
    assert changed(NVCC_APPEND_FLAGS="-G") == (True, False, False)
    assert changed(NVCC_PREPEND_FLAGS="-G") == (True, False, False)
    assert changed(CXXFLAGS="-march=native -g") == (False, True, True)


def test_flags_of_the_environment_are_those_of_compiler_and_linker(
    toolchain, monkeypatch, tmp_path
):
    import library

    commands = []
    monkeypatch.setattr(library, "CACHE", tmp_path)
    monkeypatch.setenv("CXXFLAGS", "-DA=1 '-DB=a b'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")

    def run(what, command):
        words = [str(word) for word in command]
        commands.append(words)
        Path(words[words.index("-o") + 1]).touch()
        return ""

    monkeypatch.setattr(library, "run", run)
    tools = toolchain.Toolchain("cpu", cxx=("g++",), torch_include=Path("/torch"))
    built = library.Library(tools)
    built.build(tmp_path / "_C.so")
    built.build_host_module(tmp_path / "_host.so")
    compiled = [words for words in commands if "-c" in words]
    libraries = (str(tmp_path / "_C.so"), str(tmp_path / "_host.so"))
    linked = [words for words in commands if words[-1] in libraries]
    assert len(compiled) == 1 + len(library.CPU_SOURCES)
    assert all("-DA=1" in words and "-DB=a b" in words for words in compiled)
    assert len(linked) == 2
    assert all("-Wl,-z,now" in words for words in linked)


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_than_on_linux_the_pure_package_is_built(toolchain, monkeypatch, system):
    monkeypatch.setattr(platform, "system", lambda: system)
    found = toolchain.decide()
    assert found.mode == "none"
    assert [reason.split(":")[0] for reason in found.refused] == ["not cuda", "not cpu"]
    assert f"not {system}" in found.refused[0]
    monkeypatch.setenv("FUSEFORMER_BUILD", "cpu")
    with pytest.raises(
        SystemExit, match=f"FUSEFORMER_BUILD=cpu: compiled libraries .* not {system}"
    ):
        toolchain.decide()


def test_what_is_missing_decides_the_mode(toolchain, monkeypatch):
    def missing(*_):
        raise toolchain.Missing("none here: get one")

    monkeypatch.setattr(toolchain, "find_cuda", missing)
    assert toolchain.decide().mode == "cpu"
    assert toolchain.decide().refused == ("not cuda: none here: get one",)
    monkeypatch.setattr(toolchain, "find_compiler", missing)
    assert toolchain.decide().mode == "none"
    assert len(toolchain.decide().refused) == 2


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_a_number_of_compilers_is_a_number(toolchain, monkeypatch, asked):
    monkeypatch.setenv("MAX_JOBS", asked)
    with pytest.raises(SystemExit, match="MAX_JOBS: got"):
        toolchain.jobs()
