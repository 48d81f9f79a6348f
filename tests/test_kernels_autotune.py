"""The search for configs: off unless asked for, once a kind of call, its winners kept."""

import json

import pytest
import torch
from fuseformer.kernels import (
    attention,
    attention_layout,
    autotune,
    decode,
    feed_forward,
    gated_feed_forward,
)
from fuseformer.kernels.attention_configs import Tiles, attention_tiles, candidates
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

CPU = torch.device("cpu")
TABLE = attention_tiles("forward", "sm_80", 16, torch.float16, "lean")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return the folder of the winners, one for each test, and forget those read before."""
    monkeypatch.setenv("FUSEFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_winners", None)
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("FUSEFORMER_AUTOTUNE", "1")


def forget(monkeypatch):
    """As a new process does."""
    monkeypatch.setattr(autotune, "_winners", None)


def forward():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, dtype=torch.float16)
    options = (None, "none", -1, -1, 0.0, 0.25, 0.0)
    out, _ = attention.attention_forward(q, k, v, *[None] * 5, *options)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.float() for x in (q, k, v)))
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-3)


def never(*_):
    raise AssertionError("nothing should be tried")


def test_nothing_is_searched_or_written_unless_asked_for(monkeypatch, folder):
    monkeypatch.setattr(autotune, "_milliseconds", never)
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("FUSEFORMER_AUTOTUNE", value)
        forward()
    assert not folder.exists()


def test_the_fastest_wins_is_used_and_is_kept(monkeypatch, folder, asked):
    """Time is what the test says it is; kernels run for the result alone."""
    fastest = Tiles(64, 64, 32, 4, 2)
    tried, used = [], []
    every = [TABLE, Tiles(128, 64, 64, 8, 1), fastest, Tiles(32, 32, 32, 4, 1)]

    def milliseconds(run, device):
        tiles = run.__defaults__[0] if run.__defaults__ else TABLE
        tried.append(tiles)
        if tiles.block_m == 32:
            raise OutOfResources(1, 0, "shared memory")
        return 1.0 if tiles == fastest else 2.0

    launch = attention_layout.launch
    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    monkeypatch.setattr("fuseformer.kernels.attention_layout.candidates", lambda *_: every)
    monkeypatch.setattr(
        attention_layout, "launch", lambda *a, **k: (used.append(a[2]["BLOCK_M"]), launch(*a, **k))
    )
    forward()
    assert tried == every
    assert used == [64]
    [kept] = json.loads((folder / "tiles.json").read_text()).values()
    [(request, config)] = kept.items()
    assert request.startswith("attention forward torch.float16 16 1 lean False False")
    assert config == list(fastest)

    forget(monkeypatch)
    monkeypatch.setattr(autotune, "_milliseconds", never)
    forward()
    assert used == [64, 64]


def test_candidates_are_measured_for_real(monkeypatch, folder, asked):
    few = [TABLE, Tiles(64, 32, 32, 4, 1)]
    monkeypatch.setattr("fuseformer.kernels.attention_layout.candidates", lambda *_: few)
    forward()
    [kept] = json.loads((folder / "tiles.json").read_text()).values()
    assert tuple(*kept.values()) in few


def test_a_config_of_the_table_that_fails_raises(monkeypatch, asked):
    def milliseconds(run, device):
        raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    with pytest.raises(TritonError, match="shared memory"):
        forward()


def test_winners_of_other_processes_and_machines_stay(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", lambda run, device: 1.0)
    folder.mkdir()
    path = folder / "tiles.json"
    path.write_text(json.dumps({"another GPU, triton 3.9.0": {"a kernel": [1, 2]}}))
    run = {"config": (4,), "candidates": lambda: [(8,)], "run": lambda _: None, "device": CPU}
    assert autotune.tuned("first", (), **run) == (4,)
    here = json.loads(path.read_text())
    here[autotune._machine(CPU)]["meanwhile"] = [7]
    path.write_text(json.dumps(here))
    autotune.tuned("second", (1, "x"), **run)
    found = json.loads(path.read_text())
    assert found["another GPU, triton 3.9.0"] == {"a kernel": [1, 2]}
    assert set(found[autotune._machine(CPU)]) == {"first ", "meanwhile", "second 1 x"}
    assert [file.name for file in folder.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}'])
def test_a_broken_file_is_named_and_left_alone(folder, asked, text):
    folder.mkdir()
    (folder / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json does not hold configs .* remove it"):
        forward()
    assert (folder / "tiles.json").read_text() == text


def test_a_value_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("FUSEFORMER_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FUSEFORMER_AUTOTUNE is 'yes', expected 0 or 1"):
        forward()


def test_every_kernel_with_a_table_can_be_searched(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", lambda run, device: 1.0)
    half = torch.float16
    q, k = torch.randn(2, 1, 2, 40, 16, dtype=half)
    bias = torch.randn(2, 40, 40, dtype=half)
    given = (bias, None, None, None, None, None, "none", -1, -1, 0.0, 0.25, 0.0)
    out, lse = attention.attention_forward(q, k, k, *given)
    attention.attention_backward(out, None, q, k, k, out, lse, *given, True)
    lengths = torch.tensor([40], dtype=torch.int32)
    decode.decode_attention(q[:, :, :1], k, k, lengths, None, None, None, -1, 0.0, 0.25)
    x, w = torch.randn(64 * 128, 32, dtype=half), torch.randn(64, 32, dtype=half)
    arguments = (x, w, None, w.t().contiguous(), None, None, "relu", 0.0)
    y, pre = feed_forward.feed_forward_forward(*arguments)
    feed_forward.feed_forward_backward(y, *arguments[:4], pre, None, "relu", 0.0, False)
    wide = torch.randn(48, 512, dtype=half)
    w1 = torch.randn(64, 512, dtype=half)
    feed_forward.feed_forward_forward(wide, w1, None, w1.t().contiguous(), None, None, "relu", 0.0)
    gated = (x, w, w, w.t().contiguous())
    y, *saved = gated_feed_forward.gated_feed_forward_forward(*gated, None, "silu", 0.0)
    gated_feed_forward.gated_feed_forward_backward(y, *gated, *saved, None, "silu", 0.0)
    [kept] = json.loads((folder / "tiles.json").read_text()).values()
    kernels = {request.split(" torch")[0] for request in kept}
    assert kernels == {
        *(f"attention {name}" for name in ("forward", "key_gradient", "query_gradient")),
        "attention bias_gradient",
        "decode_attention",
        "feed_forward_resident",
        "feed_forward_resident_gradient",
        "gated_feed_forward_resident",
        "gated_feed_forward_resident_gradient",
        "linear_activation",
    }


def test_a_search_tries_what_the_tables_hold_and_more():
    found = candidates("forward", 64, torch.bfloat16)
    assert len(found) == len(set(found))
    for family in ("sm_80", "sm_86", "sm_90", "sm_100"):
        assert attention_tiles("forward", family, 64, torch.bfloat16, "lean") in found
    assert {tiles.warps for tiles in found} == {4, 8}
    single = candidates("forward", 64, torch.float32)
    assert all(tiles.block_m <= 32 for tiles in single)


def test_lengths_of_a_class_share_a_search():
    assert {autotune.size_class(n) for n in (1025, 1500, 2048)} == {2048}
    assert autotune.size_class(0) == 0
