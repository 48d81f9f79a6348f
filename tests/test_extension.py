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
        "from fuseformer import extension\n"
        "from fuseformer.cuda import library\n"
        "assert library.problem() is None\n"
        "ops = library.ops()\n"
        "print(ops.attention_forward.default._schema)\n"
        "print(ops.runtime_version(), library.runs_on(86, extension.build()['architectures']))\n"
        "print(library.refusal(90)); print(library.refusal(80))\n",
    ).splitlines()
    assert said[0].startswith("fuseformer_cuda::attention_forward(Tensor q, Tensor k, Tensor v")
    assert said[1] == "13000 True"
    assert said[2] == "the CUDA C++ kernels were compiled for 80, not for sm_90"
    assert said[3] == "None" or "update the driver" in said[3]


def test_the_library_for_the_cpu_decides_dropout_as_defined(installation):
    said = python(
        installation,
        "import torch\n"
        "from fuseformer import extension\n"
        "from fuseformer.cpu.dropout import _numpy_keep_mask, keep_mask\n"
        "assert extension.problem() is None\n"
        "cases = [([0], [0], range(16), range(32)),\n"
        "    ([3, 70000], [1], range(5, 77), range(31, 600)),\n"
        "    ([2], [3], range(33, 50), range(70, 700)),\n"
        "    ([1], [4, 0, 2], range(100, 101), range(7, 8)), ([], [1], range(3), range(3)),\n"
        "    ([0], [1], range(0), range(5)), ([0], [1], range(5), range(0)),\n"
        "    ([0], [0, 1], range(40), range(2000))]\n"
        "for seed in (-1, 0, 2**63 - 1):\n"
        "    for p in (0.0, 0.1, 1.0):\n"
        "        for case in cases:\n"
        "            compiled = keep_mask(torch.tensor(seed), p, *case)\n"
        "            assert torch.equal(compiled, _numpy_keep_mask(torch.tensor(seed), p, *case))\n"
        "op, i64 = torch.ops.fuseformer_cpu.dropout_mask, torch.tensor([0])\n"
        "one, two = torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, 2)\n"
        "for keep, batches in ((one, i64), (two.bool(), i64), (one.bool(), i64.int())):\n"
        "    try: op(torch.tensor(1), batches, i64, 0, 0, 5, keep)\n"
        "    except RuntimeError as error: print(str(error).splitlines()[0])\n",
    ).splitlines()
    assert "keep: got another tensor than contiguous bools" in said[0]
    assert "keep: got 1 batches of 2 heads, expected 1 of 1" in said[1]
    assert "batches: got another tensor than contiguous int64 numbers" in said[2]


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


@pytest.mark.parametrize(
    ("missing", "command", "said"),
    [
        (
            "fuseformer._host",
            "c.main(['info', '--kernels', '80'])",
            "install fuseformer again with",
        ),
        ("triton", "c.main(['info'])", "the triton package is not installed"),
        ("tokenizers", "c.main(['pretrain', '--output', 'run'])", 'pip install "fuseformer[tune]"'),
    ],
)
def test_what_is_missing_is_said_when_it_is_asked_for(installation, missing, command, said):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "import torch, fuseformer as ff, fuseformer.cli as c\n"
        "q = torch.randn(1, 2, 5, 8)\n"
        "assert ff.attention(q, q, q).shape == q.shape\n"
        "print('works')\n" + command
    )
    done = run(sys.executable, "-c", code, PYTHONPATH=str(installation))
    assert done.stdout.startswith("works")
    assert said in done.stdout + done.stderr


def test_the_record_and_the_tables(installation):
    built = json.loads((installation / "fuseformer/_build.json").read_text())
    assert built["mode"] == "cuda"
    assert built["architectures"] == ["80"]
    text = python(installation, "import fuseformer.cli as c; c.main(['info', '--kernels', '80'])")
    assert len({len(line) for line in text.splitlines()}) == 1
    rows = text.splitlines()[1:]
    # Two dtypes, with and without dropout, of thirteen tiles; decoding has no dropout.
    attention = 4 * 13 + 2 * 5
    # Four activations at three widths, relu and others backward; few rows have no dropout.
    assert len(rows) == attention + 4 * (4 * 3 + 2 * 5 + 2) + 2 * 3
    assert any(r.startswith("feed-forward backward small bf16 128 relu dropout ") for r in rows)
    row = next(r for r in rows if r.startswith("forward bf16 128 ")).split()
    assert row[3] == "128x64"
    assert row[4] == "256"
    assert int(row[6]) <= 255
    info = python(installation, "import fuseformer.cli as c; c.main(['info'])")
    assert "built        with CUDA 13.0 for 80" in info
    # What Python says that there is, there is.
    tiles = python(
        installation,
        "from fuseformer import _host\n"
        "from fuseformer.cuda import attention, decode\n"
        "dims = lambda name: tuple(t['size'] for t in tiles if t['kernel'] == name)\n"
        "tiles = _host.tiles()\n"
        "assert dims('forward') == dims('backward') == dims('decode') == attention.HEAD_DIMS\n"
        "widest = [t for t in tiles if t['kernel'] == 'decode'][0]\n"
        "assert (widest['block_m'], widest['block_n']) == (decode._ROWS, decode._STEP)\n"
        "print(len(tiles))\n",
    )
    assert tiles.strip() == "31"
    import_alone = python(
        installation, "from fuseformer import _host; print(_host.architectures())"
    )
    assert import_alone.strip() == "80"


def test_no_kernel_spills_a_register(installation):
    assert json.loads((installation / "fuseformer/_build.json").read_text())["spills"] == []


def test_a_build_beside_the_sources_compiles_nothing_again(installation, tmp_path):
    """What an editable install does; in a copy, which finds the objects and leaves its record."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "*.egg-info")
    for name in ("build_tools", "csrc", "kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "build/extension").mkdir(parents=True)
    for path in (ROOT / "build/extension").glob("*.[ol]*"):  # others may be compiling meanwhile
        shutil.copy(path, tmp_path / "build/extension")
    objects = sorted((tmp_path / "build/extension").glob("*.o"))
    environment = os.environ | {"FUSEFORMER_BUILD": "cuda", "FUSEFORMER_ARCHS": "80"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert sorted((tmp_path / "build/extension").glob("*.o")) == objects, "compiled again"
    package = tmp_path / "python/fuseformer"
    assert json.loads((package / "_build.json").read_text())["architectures"] == ["80"]
    code = "from fuseformer.cuda import library; print(library.refusal(90))"
    said = run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path / "python"))
    assert said.stdout.strip() == "the CUDA C++ kernels were compiled for 80, not for sm_90"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"FUSEFORMER_BUILD": "cpu", "CXX": "nowhere"}, "FUSEFORMER_BUILD=cpu: no C++ compiler"),
        (
            {"FUSEFORMER_BUILD": "fast"},
            "FUSEFORMER_BUILD: got 'fast', expected auto, none, cpu, cuda",
        ),
        ({"FUSEFORMER_ARCHS": "80,75"}, "FUSEFORMER_ARCHS: got '75', expected some of 80, "),
        (
            {"FUSEFORMER_BUILD": "auto", "FUSEFORMER_ARCHS": "sm_80"},
            "FUSEFORMER_ARCHS: got 'sm_80'",
        ),
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler 'g++' was found: install g++"),
        ({"CXX": "ccache-of-none g++"}, "no C++ compiler 'ccache-of-none g++' was found"),
        ({"CXX": "false"}, "false does not run"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: got 'many', expected a number of compilers"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(changes, said, tmp_path):
    done = build_into(tmp_path, **changes)
    assert done.returncode == 1
    assert said in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert "Traceback" not in done.stderr


def toolkit(folder, says):
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64/libcudart_static.a").touch()
    nvcc = home / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{says}'\n")
    nvcc.chmod(0o755)
    return str(home)


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ("Cuda compilation tools, release 11.8, V11.8.89", "is CUDA 11.8, 12.4 or newer is needed"),
        ("no such driver", "nvcc does not run, it says 'no such driver'"),
    ],
)
def test_a_compiler_that_will_not_do_is_named(says, said, tmp_path):
    home = toolkit(tmp_path, says)
    done = build_into(tmp_path / "out", CUDA_HOME=home)
    assert done.returncode == 1
    assert said in done.stderr
    # Nobody asked for it by name: then the library for the CPU is built, and it is said why.
    done = build_into(tmp_path / "out", CUDA_HOME=home, FUSEFORMER_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "building in mode 'cpu'; not cuda: " in done.stderr
    assert said in done.stderr
    built = json.loads((tmp_path / "out/fuseformer/_build.json").read_text())
    assert built["mode"] == "cpu"
    assert said in built["refused"][0]


def test_an_older_toolkit_compiles_what_it_knows(tmp_path):
    """12.4 has no sm_100 and sm_120: they are left out by default, and refused by name."""
    home = toolkit(tmp_path, "Cuda compilation tools, release 12.4, V12.4.99")
    done = build_into(tmp_path / "out", CUDA_HOME=home, FUSEFORMER_ARCHS="")
    assert "building in mode 'cuda' with CUDA 12.4 for 80+PTX, 90" in done.stderr
    done = build_into(tmp_path / "out", CUDA_HOME=home, FUSEFORMER_ARCHS="80,120")
    assert "FUSEFORMER_ARCHS: got '120', expected some of 80, 86, 87, 89, 90, each" in done.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("build_tools", "csrc", "kernels", "python"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "build").touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "out")]
    environment = os.environ | {"FUSEFORMER_BUILD": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "build/extension cannot be written" in done.stderr
    assert "build from a copy of the sources in a folder that can" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_for_people_has_the_headers_that_are_asked_for(monkeypatch):
    """torch has pybind11's headers of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    library, toolchain = pytest.importorskip("library"), pytest.importorskip("toolchain")
    include = Path(torch.__file__).parent / "include"
    tools = toolchain.Toolchain("cpu", cxx=("g++",), torch_include=include)
    command = [*library.Library(tools)._host_module_command, "-M", library.SOURCES / "host.cpp"]
    used = run(*command).stdout
    assert "pybind11/pybind11.h" in used
    assert "torch" not in used


def test_a_source_is_compiled_anew_for_its_own_headers_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_tools"))
    library = pytest.importorskip("library")
    texts = library._texts(library.SOURCES / "attention/forward_bf16.cu")
    assert {"attention/forward_kernel.h", "device/mma.h", "device/platform.h"} <= set(texts)
    assert not any(name.startswith("feed_forward/") for name in texts)
    assert "attention/forward_kernel.h" not in library._texts(library.SOURCES / "library.cpp")
