"""When the CUDA C++ kernels are chosen, and what is said where they cannot be."""

import json
import re
import warnings

import pytest
import torch

import fuseformer as ff
from fuseformer import backends, extension
from fuseformer.backends import Request, choose_backend
from fuseformer.cuda import library


def request(**changes):
    fields = {
        "op": "attention",
        "device": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "capability": 80,
    }
    return Request(**(fields | changes))


@pytest.fixture
def installation(monkeypatch, tmp_path):
    """A folder that stands for the installed package; `extension` looks there."""
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    cached = (extension.build, extension.problem, library.driver_problem)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def built(folder, mode="cuda", architectures=("80", "90", "120+PTX")):
    known = {"mode": mode, "architectures": architectures, "cuda": "13.0", "kernels": []}
    (folder / "_build.json").write_text(json.dumps(known))


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(library, "refusal", lambda capability: None)
    monkeypatch.setattr(backends, "has_triton", lambda: True)


def new_tokens(count, **changes):
    return {"op": "decode_attention", "shapes": ((2, 8, count, 64), (2, 8, 999, 64)), **changes}


@pytest.mark.parametrize(
    ("changes", "chosen", "because"),
    [
        ({"capability": 80}, "cuda", "CUDA C++ goes before Triton on sm_80"),
        ({"capability": 86}, "cuda", "sm_86"),
        ({"op": "decode_attention"}, "cuda", "sm_80"),
        ({"capability": 89}, "cuda", "sm_89"),
        ({"capability": 120}, "cuda", "sm_120"),
        ({"capability": 90}, "triton", "Triton goes before CUDA C++ for this call on sm_90"),
        ({"capability": 100}, "triton", "Triton goes before CUDA C++ for this call on sm_100"),
        ({"head_dim": 256}, "cuda", "CUDA C++ goes before Triton on sm_80"),
        ({"head_dim": 256, "trains": True}, "cuda", "CUDA C++ goes before Triton on sm_80"),
        ({"head_dim": 72}, "triton", "fused Triton kernels"),
        ({"dtype": torch.float32}, "triton", "fused Triton kernels"),
        ({"options": frozenset({"bias"})}, "triton", "fused Triton kernels"),
        ({"op": "rotary"}, "triton", "fused Triton kernels"),
        (new_tokens(16), "cuda", "sm_80"),
        (new_tokens(17), "triton", "splits the keys of so few new tokens"),
        (new_tokens(64), "triton", "splits the keys of so few new tokens"),
        (new_tokens(65), "cuda", "sm_80"),
        (new_tokens(65, capability=90), "triton", "before CUDA C++ for this call on sm_90"),
        (new_tokens(16, options=frozenset({"block_table"})), "cuda", "sm_80"),
        (new_tokens(17, options=frozenset({"block_table"})), "triton", "fused Triton kernels"),
    ],
)
def test_which_kernels_go_first(changes, chosen, because, usable):
    name, reason = choose_backend(request(**changes))
    assert name == chosen
    assert because in reason


def feed_forward(width, *, out=None, gated=False, **changes):
    shapes = ((64, width), (4 * width, width), (out or width, 4 * width))
    op = "gated_" * gated + "feed_forward"
    return request(op=op, head_dim=0, shapes=shapes, **{"activation": "gelu"} | changes)


@pytest.mark.parametrize(
    ("asked", "chosen", "because"),
    [
        (feed_forward(128), "cuda", "CUDA C++ goes before Triton on sm_80"),
        (feed_forward(256, activation="silu", capability=89), "cuda", "sm_89"),
        (feed_forward(512), "cuda", "sm_80"),
        (feed_forward(512, trains=True), "cuda", "sm_80"),
        (feed_forward(1032), "triton", "at more than 1024 columns the vendor's products"),
        (feed_forward(128, activation="relu"), "triton", "score better with ReLU"),
        (feed_forward(512, activation="relu"), "triton", "score better with ReLU"),
        (feed_forward(128, trains=True), "cuda", "sm_80"),
        (feed_forward(64, activation="relu", trains=True), "cuda", "sm_80"),
        (feed_forward(96, trains=True), "triton", "one kernel for both products of every width"),
        (feed_forward(128, activation="silu"), "triton", "scores better with SiLU"),
        (feed_forward(96), "triton", "one kernel for both products of every width up to 256"),
        (feed_forward(128, out=64), "triton", "one kernel for both products"),
        (feed_forward(128, capability=90), "triton", "instructions that only these GPUs have"),
        (feed_forward(12), "triton", "fused Triton kernels"),
        (feed_forward(512, gated=True), "cuda", "CUDA C++ goes before Triton on sm_80"),
        (feed_forward(512, gated=True, activation="relu", trains=True), "cuda", "sm_80"),
        (feed_forward(512, gated=True, capability=120), "cuda", "sm_120"),
        (feed_forward(512, gated=True, capability=100), "triton", "only these GPUs have"),
        (feed_forward(128, gated=True), "triton", "keeps hidden activations of narrow blocks"),
        (feed_forward(128, gated=True, out=512), "cuda", "sm_80"),
        (feed_forward(4096, gated=True), "cuda", "sm_80"),
        (feed_forward(4096, gated=True, trains=True), "triton", "at more than 2048 columns"),
        (feed_forward(5120, gated=True), "triton", "at more than 4096 columns"),
        (feed_forward(512, gated=True, dtype=torch.float32), "triton", "fused Triton kernels"),
    ],
)
def test_which_feed_forward_kernels_go_first(asked, chosen, because, usable):
    name, reason = choose_backend(asked)
    assert name == chosen
    assert because in reason


def test_without_triton_cuda_serves_where_it_can(usable, monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert choose_backend(request(capability=90)) == (
        "cuda",
        "the CUDA C++ kernels serve this call, because the triton package is not installed",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"op": "rotary"}, "no CUDA C++ kernel for rotary yet"),
        ({"dtype": torch.float32}, "float16 and bfloat16, not torch.float32"),
        ({"head_dim": 72}, "head dims 32, 64, 96, 128, 256, not 72"),
        ({"options": frozenset({"softcap", "bias"})}, "do not take bias, softcap"),
        ({"capability": 75}, "sm_80 or newer, this one is sm_75"),
        ({"device": "cpu"}, "do not run on cpu tensors"),
        (
            {"op": "feed_forward", "head_dim": 0, "shapes": ((4, 12), (16, 12))},
            "multiples of 8, not 12 and 16",
        ),
        (
            {"op": "gated_feed_forward", "head_dim": 0, "shapes": ((4, 16), (20, 16))},
            "multiples of 8, not 16 and 20",
        ),
    ],
)
def test_what_they_cannot_do_is_said(changes, said, usable):
    with pytest.raises(ValueError, match="'cuda' cannot serve .*" + re.escape(said)):
        choose_backend(request(requested="cuda", **changes))


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        (80, ["80"], True),
        (86, ["80"], True),
        (89, ["80", "90"], True),
        (90, ["80"], False),
        (90, ["80+PTX"], True),
        (80, ["86", "90"], False),
        (120, ["80", "90", "100", "120+PTX"], True),
        (121, ["80", "120"], True),
        (130, ["80", "120+PTX"], True),
        (110, ["80+PTX", "90", "100", "120"], True),
        (121, ["80+PTX", "90", "100", "120"], True),
        (103, ["100"], True),
    ],
)
def test_what_runs_on_a_gpu(capability, architectures, runs):
    assert library.runs_on(capability, architectures) is runs


def test_an_installation_without_them_says_how_to_build_them(installation):
    assert "FUSEFORMER_BUILD=cuda" in library.refusal(80)
    built(installation, mode="none")
    extension.build.cache_clear()
    assert "FUSEFORMER_BUILD=cuda" in library.refusal(80)
    with pytest.raises(RuntimeError, match="built without the CUDA C\\+\\+ kernels"):
        library.ops()


def test_a_missing_library_is_reported_once(installation):
    built(installation)
    with pytest.warns(UserWarning, match="_C is missing"):
        assert "missing" in library.refusal(80)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "missing" in library.refusal(80)
    assert choose_backend(request())[0] != "cuda"


def test_an_unloadable_library_is_reported_with_the_loader_s_words(installation):
    built(installation)
    (installation / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="_C.abi3.so cannot be loaded: .*(ELF|too short)"):
        assert "cannot be loaded" in library.refusal(80)


def test_an_architecture_that_was_not_compiled_is_named(installation, monkeypatch):
    built(installation, architectures=["90", "120"])
    monkeypatch.setattr(library, "problem", lambda: None)
    said = library.refusal(80)
    assert said == "the CUDA C++ kernels were compiled for 90, 120, not for sm_80"


def test_an_old_driver_is_named(installation, monkeypatch):
    class Old:
        driver_version = staticmethod(lambda: 12040)
        runtime_version = staticmethod(lambda: 13000)

    built(installation)
    monkeypatch.setattr(library, "problem", lambda: None)
    monkeypatch.setattr(library, "ops", lambda: Old)
    assert "the driver knows CUDA 12.4, the kernels were compiled with 13.0" in library.refusal(80)
    library.driver_problem.cache_clear()
    Old.driver_version = staticmethod(lambda: 13020)
    assert library.refusal(80) is None


def test_compiled_graphs_take_the_refusal_for_a_constant():
    @torch.compile(backend="eager", fullgraph=True)
    def shifted(x):
        return x + (1 if library.refusal(80) is None else 2)

    assert shifted(torch.ones(1)) in (2, 3)


def test_the_cpu_is_refused_by_name():
    q = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="do not run on cpu tensors"):
        ff.attention(q, q, q, backend="cuda")
