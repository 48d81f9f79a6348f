"""What a release consists of, what its builds ask for, and what importing it loads."""

import sys
import venv

import pytest
from commands import run


def test_the_list_of_what_a_release_builds():
    command = (
        sys.executable,
        "-m",
        "cibuildwheel",
        "--print-build-identifiers",
        "--platform",
        "linux",
    )
    said = run(*command, CIBW_ARCHS="x86_64 aarch64").stdout.split()
    tags = ("cp310", "cp311", "cp312", "cp313", "cp314t")
    assert sorted(said) == sorted(
        f"{tag}-manylinux_{arch}" for tag in tags for arch in ("x86_64", "aarch64")
    )


def test_importing_imports_nothing_that_is_not_used():
    code = (
        "import torch, sys, time\n"
        "before, begin = set(sys.modules), time.perf_counter()\n"
        "import fuseformer, fuseformer.cli\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(' '.join(sorted(new)))\n"
    )
    new = set(run(sys.executable, "-c", code, cwd="/").stdout.split())
    heavy = {
        "triton",
        "transformers",
        "matplotlib",
        "tokenizers",
        "sacrebleu",
        "jinja2",
        "pybind11",
    }
    assert "fuseformer" in new
    assert not new & heavy


@pytest.mark.parametrize(("mode", "wanted"), [("none", 0), ("auto", 0), ("cpu", 1), ("cuda", 5)])
def test_the_backend_asks_for_what_a_named_mode_misses(mode, wanted, tmp_path):
    """In an environment without torch and without nvcc."""
    venv.create(tmp_path / "empty", with_pip=False)
    code = (
        "import sys; sys.path.insert(0, 'build_tools')\n"
        "import types; fake = types.ModuleType('setuptools.build_meta')\n"
        "fake.get_requires_for_build_wheel = lambda config: ['a']\n"
        "fake.get_requires_for_build_editable = fake.get_requires_for_build_wheel\n"
        "sys.modules['setuptools'] = types.ModuleType('setuptools')\n"
        "sys.modules['setuptools.build_meta'] = fake\n"
        "import fuseformer_backend as b; print(' '.join(b.get_requires_for_build_wheel()))\n"
    )
    python = tmp_path / "empty/bin/python"
    changes = {"FUSEFORMER_BUILD": mode, "CUDA_HOME": "/nowhere", "PATH": "/nowhere"}
    said = run(python, "-c", code, **changes).stdout.split()
    assert len(said) == 1 + wanted
    assert ("torch>=2.10" in said) == (wanted > 0)
