import subprocess
import sys

import pytest
import torch

import fuseformer as ff
from fuseformer import backends
from fuseformer.backends import Request, choose_backend, refusal


def request(**changes):
    fields = {"op": "attention", "device": "cuda", "dtype": torch.bfloat16, "head_dim": 64}
    return Request(**(fields | changes))


def test_the_cpu_is_served_by_the_cpu_backend():
    name, reason = choose_backend(request(device="cpu"))
    assert name == "cpu"
    assert "cpu" in reason


@pytest.mark.skipif(not backends.has_triton(), reason="the triton package is not installed")
@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 264}, "264"),
        ({"capability": 75}, "sm_80 or newer, this one is sm_75"),
        ({"op": "add_rms_norm", "head_dim": 0, "shapes": ((4, 8193),)}, "8192 values, not 8193"),
        ({"op": "attention_weights", "head_dim": 0}, "no Triton kernel for attention_weights"),
    ],
)
def test_what_triton_cannot_do_goes_to_the_reference_with_the_reason(changes, because):
    name, reason = choose_backend(request(**changes))
    assert name == "reference"
    assert because in reason
    with pytest.raises(ValueError, match="'triton' cannot serve"):
        choose_backend(request(requested="triton", **changes))


@pytest.mark.skipif(not backends.has_triton(), reason="the triton package is not installed")
def test_a_gpu_is_served_by_triton():
    assert choose_backend(request())[0] == "triton"


def test_the_capability_of_a_gpu_is_part_of_the_request(monkeypatch):
    fake = torch._subclasses.fake_tensor.FakeTensorMode()
    with fake:
        q = torch.empty(1, device="cuda")
        assert backends.request_for("attention", q).capability == 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
        assert backends.request_for("attention", q).capability == 89
    assert backends.request_for("attention", torch.empty(1)).capability == 0


def test_a_compiled_graph_takes_the_capability_for_a_constant(monkeypatch):
    def untraceable():
        with open(sys.executable, "rb") as file:  # the compiler follows no file
            return not file.read(1)

    monkeypatch.setattr(torch.cuda, "is_available", untraceable)

    @torch.compile(backend="eager", fullgraph=True)
    def shifted(x):
        return x + backends.device_capability(0)

    assert shifted(torch.ones(1)) == 1


def test_without_triton_a_gpu_is_served_by_plain_pytorch(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    name, reason = choose_backend(request())
    assert name == "reference"
    assert "not installed" in reason


def test_every_refusal_is_a_sentence():
    for name in backends.BACKENDS:
        reason = refusal(name, request(device="cpu", dtype=torch.float64))
        assert reason is None or (len(reason) > 10 and not reason.endswith("."))


def test_use_backend_forces_and_restores():
    q = torch.randn(1, 1, 4, 8)
    with ff.use_backend("reference"), ff.explain() as inner:
        ff.attention(q, q, q)
        with ff.use_backend("cpu"):
            ff.attention(q, q, q)
    ff.attention(q, q, q)
    assert [d.backend for d in inner.decisions] == ["reference", "cpu"]
    assert ff.explain().decisions[-1].backend == "cpu"
    with ff.use_backend("cuda"), pytest.raises(ValueError, match="cannot serve attention"):
        ff.attention(q, q, q)
    with pytest.raises(ValueError, match="name: got 'tpu'"), ff.use_backend("tpu"):
        pass


def test_explain_names_the_backend_the_reason_and_the_others():
    q = torch.randn(1, 2, 4, 8)
    with ff.explain() as decisions:
        for _ in range(3):
            ff.attention(q, q, q, softcap=2.0)
    text = str(decisions)
    assert "attention 1x2x4x8 1x2x4x8 float32 [softcap] (3 calls): cpu" in text
    assert "not cuda: " in text
    assert "not triton: " in text
    assert str(ff.backends.Explanation()) == "no call of a fuseformer op yet"


def test_import_leaves_heavy_packages_alone():
    """Triton and the packages of the extras are imported when they are used, not before."""
    heavy = ["triton", "transformers", "matplotlib", "tokenizers", "jinja2", "sacrebleu"]
    code = (
        "import sys, torch; before = set(sys.modules); import fuseformer; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
