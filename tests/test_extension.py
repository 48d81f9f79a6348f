"""The extension, built by the compilers of the package index for one architecture, and loaded."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command, **changes):
    return subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | {"FUSEFORMER_BUILD": "cuda", "FUSEFORMER_ARCHS": "80"} | changes,
        capture_output=True,
        text=True,
        check=False,
    )


def build_into(folder, **changes):
    return run(
        *(sys.executable, "setup.py", "-q", "build_ext"),
        *("--build-lib", folder, "--build-temp", folder / "objects"),
        **changes,
    )


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    """A copy of the package with what was built."""
    folder = tmp_path_factory.mktemp("built")
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/extension.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one compiles, the others find objects
        done = build_into(folder, MAX_JOBS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    for source, target in (("python/fuseformer", "fuseformer"), ("kernels", "fuseformer/kernels")):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
        shutil.copytree(ROOT / source, folder / target, ignore=ignored, dirs_exist_ok=True)
    return folder


def python(installation, code):
    done = run(sys.executable, "-c", code, PYTHONPATH=str(installation))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_library_loads_where_no_gpu_is(installation):
    said = python(
        installation,
        "import torch\n"
        "from fuseformer.cuda import library\n"
        "assert library.problem() is None\n"
        "ops = library.ops()\n"
        "print(ops.attention_forward.default._schema)\n"
        "print(ops.runtime_version(), library.runs_on(86, library.build()['architectures']))\n"
        "print(library.refusal(90)); print(library.refusal(80))\n",
    ).splitlines()
    assert said[0].startswith("fuseformer_cuda::attention_forward(Tensor q, Tensor k, Tensor v")
    assert said[1] == "13000 True"
    assert said[2] == "the CUDA C++ kernels were compiled for 80, not for sm_90"
    assert said[3] == "None" or "update the driver" in said[3]


def test_the_schemas_take_what_python_and_the_emulator_give(installation):
    said = python(
        installation,
        "from fuseformer.cuda import library\n"
        "for name in ('forward', 'backward', 'decode'):\n"
        "    schema = getattr(library.ops(), 'attention_' + name).default._schema\n"
        "    print(*(a.name for a in schema.arguments))\n",
    ).splitlines()
    bindings = (ROOT / "csrc/emulator/bindings.cpp").read_text()
    for names, function in zip(said, ("forward", "backward", "decode"), strict=True):
        part = bindings.split(f'm.def("attention_{function}"')[1].split("m.def")[0]
        placed = re.findall(r'view\("(\w+)", args\[(\d+)\]\)', part)
        given = re.search(r"give_options\(a, args, (\d+)\)", part)
        options = int(given[1]) if given else len(placed)
        assert [name for name, _ in placed] == names.split()[:options]
        assert [int(place) for _, place in placed] == list(range(options))


def test_a_gpu_only_op_refuses_other_tensors(installation):
    said = python(
        installation,
        "import torch\n"
        "from fuseformer.cuda import library\n"
        "try: library.ops().attention_step_rows(torch.zeros(1, 1, 8, 64))\n"
        "except NotImplementedError as error: print(error)\n",
    )
    assert "'CPU' backend" in said


def test_only_stable_symbols_of_torch_are_used(installation):
    library = next((installation / "fuseformer").glob("_C.abi3.so"))
    said = run("nm", "-D", "--undefined-only", library).stdout.split()
    names = {name.split("@")[0] for name in said if len(name) > 1}
    torch_names = {n for n in names if "torch" in n or "c10" in n or "at::" in n}
    assert torch_names
    include = Path(torch.__file__).parent / "include/torch/csrc"
    shims = [include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"]
    declared = set(re.findall(r"\b\w*torch_\w+", "".join(shim.read_text() for shim in shims)))
    assert torch_names - declared == set()
    needed = run("readelf", "-d", library).stdout
    assert "libtorch.so" in needed
    assert "libcudart" not in needed


def test_the_record_and_the_tables(installation):
    built = json.loads((installation / "fuseformer/_build.json").read_text())
    assert built["mode"] == "cuda"
    assert built["architectures"] == ["80"]
    text = python(installation, "import fuseformer.cli as c; c.main(['info', '--kernels', '80'])")
    rows = text.splitlines()[1:]
    # Two dtypes, with and without dropout, of eleven tiles; decoding has no dropout.
    assert len(rows) == 4 * 11 + 2 * 5
    row = next(r for r in rows if r.startswith("forward bf16 128 ")).split()
    assert row[3] == "128x64"
    assert row[4] == "256"
    assert int(row[6]) <= 255
    info = python(installation, "import fuseformer.cli as c; c.main(['info'])")
    assert "CUDA C++     built with CUDA 13.0 for 80" in info
    # What Python says that there is, there is.
    tiles = python(
        installation,
        "from fuseformer import _host\n"
        "from fuseformer.cuda import attention, decode\n"
        "dims = lambda name: tuple(t['head_dim'] for t in tiles if t['pass'] == name)\n"
        "tiles = _host.attention_tiles()\n"
        "assert dims('forward') == dims('backward') == dims('decode') == attention.HEAD_DIMS\n"
        "widest = [t for t in tiles if t['pass'] == 'decode'][0]\n"
        "assert (widest['block_m'], widest['block_n']) == (decode._ROWS, decode._STEP)\n"
        "print(len(tiles))\n",
    )
    assert tiles.strip() == "18"
    import_alone = python(
        installation, "from fuseformer import _host; print(_host.architectures())"
    )
    assert import_alone.strip() == "80"


def test_a_build_beside_the_sources_leaves_its_record_there(installation, tmp_path):
    """What an editable install does; in a copy, which finds the objects."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "*.egg-info")
    for name in ("csrc", "kernels", "python", "build/extension"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    environment = os.environ | {"FUSEFORMER_BUILD": "cuda", "FUSEFORMER_ARCHS": "80"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    package = tmp_path / "python/fuseformer"
    assert json.loads((package / "_build.json").read_text())["architectures"] == ["80"]
    code = "from fuseformer.cuda import library; print(library.refusal(90))"
    said = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path / "python"))
    assert said.stdout.strip() == "the CUDA C++ kernels were compiled for 80, not for sm_90"


def test_an_unchanged_build_compiles_nothing(installation, tmp_path):
    objects = {p: p.stat().st_mtime_ns for p in (ROOT / "build/extension").glob("*.o")}
    assert build_into(tmp_path).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in (ROOT / "build/extension").glob("*.o")} == objects


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"FUSEFORMER_BUILD": "fast"}, "FUSEFORMER_BUILD: got 'fast', expected auto, none or cuda"),
        ({"FUSEFORMER_ARCHS": "80,75"}, "FUSEFORMER_ARCHS: got '75', expected some of 80, "),
        (
            {"FUSEFORMER_BUILD": "auto", "FUSEFORMER_ARCHS": "sm_80"},
            "FUSEFORMER_ARCHS: got 'sm_80'",
        ),
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler 'g++' was found: install g++"),
        ({"CXX": "ccache g++"}, "no C++ compiler 'ccache g++' was found"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: got 'many', expected a number of compilers"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(changes, said, tmp_path):
    done = build_into(tmp_path, **changes)
    assert done.returncode == 1
    assert said in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert "Traceback" not in done.stderr


def test_an_old_compiler_is_named(tmp_path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    done = build_into(tmp_path / "out", CUDA_HOME=str(home))
    assert done.returncode == 1
    assert "is CUDA 11.8; 12.8 or newer is needed" in done.stderr
