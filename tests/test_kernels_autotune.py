"""The search for configs: off unless asked for, once a kind of call, its winners kept."""

import json
import stat
import threading
import time
from contextlib import contextmanager

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
from fuseformer.kernels.common import FAMILIES
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

pytest.importorskip("ttsem")
pytestmark = pytest.mark.usefixtures("triton_on_cpu")

HALF = torch.float16
TABLE = attention_tiles("forward", "sm_80", 16, HALF, "lean")
KERNEL = attention.attention_forward_kernel


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return the folder of the winners, one for each test, and forget those read before."""
    monkeypatch.setenv("FUSEFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_winners", None)
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("FUSEFORMER_AUTOTUNE", "1")


def forward(*, bias=None, mask=None, lengths=None, sinks=None, causal="none", softcap=0.0, size=40):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, size, 16, dtype=HALF)
    options = (None, causal, -1, -1, softcap, 0.25, 0.0)
    out, _ = attention.attention_forward(q, k, v, bias, mask, lengths, None, sinks, *options)
    return out


def kept_in(folder):
    [kept] = json.loads((folder / "tiles.json").read_text()).values()
    return kept


def never(*_):
    raise AssertionError("nothing should be tried")


def constant(run, device):
    """Take no time and run nothing: the table's config is never beaten."""
    return 1.0


# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(attention_layout, "candidates", lambda *_: every)
    monkeypatch.setattr(
        attention_layout, "launch", lambda *a, **k: (used.append(a[2]["BLOCK_M"]), launch(*a, **k))
    )
    out = forward()
    assert tried == every
    assert used == [64]
    [(kind, config)] = kept_in(folder).items()
    assert kind.startswith("attention_forward_kernel ")
    assert config == list(fastest)

    monkeypatch.setattr(autotune, "_winners", None)  # as in a new process
    monkeypatch.setattr(autotune, "_milliseconds", never)
    torch.testing.assert_close(forward(), out)
    assert used == [64, 64]


def test_a_gain_that_may_be_noise_changes_nothing(monkeypatch, folder, asked):
    times = iter([1.0, 0.98, 0.99])
    monkeypatch.setattr(autotune, "_milliseconds", lambda run, device: next(times))
    every = [Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 8, 2)]
    monkeypatch.setattr(attention_layout, "candidates", lambda *_: every)
    forward()
    assert list(kept_in(folder).values()) == [list(TABLE)]


def test_candidates_are_measured_for_real(monkeypatch, folder, asked):
    few = [TABLE, Tiles(64, 32, 32, 4, 1)]
    times, measure = [], autotune._milliseconds
    monkeypatch.setattr(attention_layout, "candidates", lambda *_: few)
    monkeypatch.setattr(
        autotune, "_milliseconds", lambda *given: times.append(measure(*given)) or times[-1]
    )
    forward()
    assert len(times) == 2
    assert min(times) > 0
    wins = times[1] < 0.97 * times[0]
    assert tuple(*kept_in(folder).values()) == few[wins]


@pytest.mark.parametrize(
    ("error", "passed_over"),
    [
        (OutOfResources(1, 0, "shared memory"), True),
        (torch.OutOfMemoryError("no memory"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("illegal memory access"), False),
        (CompilationError("", None, "a bug of ours"), False),
    ],
)
def test_only_what_a_config_is_refused_for_is_passed_over(monkeypatch, asked, error, passed_over):
    def milliseconds(run, device):
        if run.__defaults__:
            raise error
        return 1.0

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    if passed_over:
        forward()
        return
    with pytest.raises(type(error)):
        forward()


def test_a_config_of_the_table_that_fails_raises(monkeypatch, folder, asked):
    def milliseconds(run, device):
        raise OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    with pytest.raises(OutOfResources, match="shared memory"):
        forward()
    assert not (folder / "tiles.json").exists()


def test_a_value_that_means_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("FUSEFORMER_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FUSEFORMER_AUTOTUNE is 'yes', expected 0 or 1"):
        forward()


def test_on_a_gpu_its_own_clock_and_stream_decide(monkeypatch, folder, asked):
    """The device of the tensors is the current one meanwhile; a capture is left alone."""
    seen, capturing = [], [True]

    @contextmanager
    def device(index):
        seen.append(index)
        yield

    class Pretender(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda", 1)

    def do_bench(run, **options):
        seen.append(options["return_mode"])
        return 1.0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    arguments = {"x": torch.zeros(1).as_subclass(Pretender)}
    call = (KERNEL, arguments, (1,), (4,), lambda: [(8,)], lambda config: None)
    assert autotune.tuned(*call) == (4,)
    assert seen == [torch.device("cuda", 1)]
    assert not folder.exists()
    capturing[0] = False
    autotune.tuned(*call)
    assert seen == [torch.device("cuda", 1)] * 2 + ["median"] * 2
    [machine] = json.loads((folder / "tiles.json").read_text())
    assert machine.startswith("GPU cuda:1, triton ")


# ------------------------------------------------------------------------------------------------
# Kinds
# ------------------------------------------------------------------------------------------------


def test_calls_that_are_compiled_apart_are_searched_apart(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", constant)
    calls = [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right"},
        {"mask": torch.zeros(1, 40, dtype=torch.bool)},
        {"lengths": torch.tensor([30], dtype=torch.int32)},
        {"sinks": torch.zeros(2)},
        {"softcap": 5.0},
        {"bias": torch.zeros(1, 1, 40, 40)},
        {"bias": torch.zeros(1, 1, 40, 40, dtype=HALF)},
        {"size": 65},
    ]
    for number, call in enumerate(calls, 1):
        forward(**call)
        assert len(kept_in(folder)) == number, call
    forward(size=33)  # of the same class as 40
    assert len(kept_in(folder)) == len(calls)


def test_empty_calls_are_not_searched(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", never)
    assert forward(size=0).shape == (1, 2, 0, 16)
    assert not folder.exists()


def test_every_kernel_with_a_table_can_be_searched(monkeypatch, folder):
    """The last of three configs wins, and computes what the table's does."""
    q, k = torch.randn(2, 1, 2, 40, 16, dtype=HALF)
    bias = torch.randn(2, 40, 40, dtype=HALF)
    given = (bias, None, None, None, None, None, "none", -1, -1, 0.0, 0.25, 0.0)
    lengths = torch.tensor([40], dtype=torch.int32)
    x, w = torch.randn(64 * 128, 32, dtype=HALF), torch.randn(64, 32, dtype=HALF)
    w2, wide = w.t().contiguous() / 64, torch.randn(48, 512, dtype=HALF)
    w1 = torch.randn(64, 512, dtype=HALF) / 512

    def results():
        out, lse = attention.attention_forward(q, k, k, *given)
        yield from (out, lse)
        yield from attention.attention_backward(out, None, q, k, k, out, lse, *given, True)[:4]
        yield from decode.decode_attention(
            q[:, :, :1], k, k, lengths, None, None, None, -1, 0, 0.0, 0.25
        )
        block = (x, w, torch.ones(64, dtype=HALF), w2, None)
        y, pre = feed_forward.feed_forward_forward(*block, None, "relu", 0.0)
        yield y
        gradients = feed_forward.feed_forward_backward(y, *block[:4], pre, None, "relu", 0.0, False)
        yield from gradients[:4]
        yield feed_forward.feed_forward_forward(
            wide, w1, None, w1.t().contiguous(), None, None, "relu", 0.0
        )[0]
        gated = (x, w, w / 32, w2)
        y, *saved = gated_feed_forward.gated_feed_forward_forward(*gated, None, "silu", 0.0)
        yield y
        yield from gated_feed_forward.gated_feed_forward_backward(
            y, *gated, *saved, None, "silu", 0.0
        )

    expected = list(results())
    monkeypatch.setenv("FUSEFORMER_AUTOTUNE", "1")
    tried = []

    def milliseconds(run, device):
        """Run three configs of a kernel; refuse the others, or they would take minutes."""
        if not run.__defaults__:
            tried.clear()
        if len(tried) == 3:
            raise OutOfResources(1, 0, "patience")
        run()
        tried.append(run)
        return 2.0 ** -len(tried)

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    torch.testing.assert_close(list(results()), expected, rtol=2e-2, atol=2e-2)
    kernels = {kind.split()[0].removesuffix("_kernel") for kind in kept_in(folder)}
    assert kernels == {
        *(f"attention_{name}" for name in ("forward", "key_gradient", "query_gradient")),
        "attention_bias_gradient",
        "decode_attention",
        "feed_forward_resident",
        "feed_forward_resident_gradient",
        "gated_feed_forward_resident",
        "gated_feed_forward_resident_gradient",
        "linear_activation",
    }


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("which", ["forward", "key_gradient", "query_gradient", "bias_gradient"])
def test_a_search_tries_what_the_tables_hold_and_more(which, dtype):
    for dim in (16, 32, 64, 128, 256):
        found = candidates(which, dim, dtype)
        assert len(found) == len(set(found)) >= 8
        for family in set(FAMILIES.values()):
            for demand in ("logits", "everything"):
                assert attention_tiles(which, family, dim, dtype, demand) in found


# ------------------------------------------------------------------------------------------------
# The file of winners
# ------------------------------------------------------------------------------------------------


def tune(size):
    arguments = {"x": torch.zeros(1)}
    return autotune.tuned(KERNEL, arguments, (size,), (4,), lambda: [(8,)], lambda config: None)


def test_winners_of_other_processes_and_machines_stay(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", constant)
    folder.mkdir()
    path = folder / "tiles.json"
    path.write_text(json.dumps({"another GPU, triton 3.9.0": {"a kernel": [1, 2]}}))
    assert tune(1) == (4,)
    here = json.loads(path.read_text())
    [machine] = set(here) - {"another GPU, triton 3.9.0"}
    here[machine] = {"meanwhile": [7]}  # which loses the first
    path.write_text(json.dumps(here))
    tune(2)
    found = json.loads(path.read_text())
    assert found["another GPU, triton 3.9.0"] == {"a kernel": [1, 2]}
    assert len(found[machine]) == 3
    assert found[machine]["meanwhile"] == [7]
    assert not list(folder.glob("tiles.[0-9]*"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((folder / "tiles.lock").stat().st_mode)


def test_threads_search_a_kind_once(monkeypatch, asked):
    runs = []

    def milliseconds(run, device):
        runs.append(run)
        time.sleep(0.05)  # long enough for the others to come
        return 1.0

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    threads = [threading.Thread(target=tune, args=(1,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', '{"a": {"b": 7}}', '{"a": {"b": ["x"]}}'])
def test_a_broken_file_is_named_and_left_alone(folder, asked, text):
    folder.mkdir()
    (folder / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json does not hold configs .* remove it"):
        forward()
    assert (folder / "tiles.json").read_text() == text


def test_a_config_of_another_length_is_refused(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", constant)
    tune(1)
    monkeypatch.setattr(autotune, "_winners", None)
    path = folder / "tiles.json"
    path.write_text(path.read_text().replace("4\n", "4, 5\n"))
    with pytest.raises(ValueError, match=r"tiles\.json holds no config for .*\[4, 5\]; remove it"):
        tune(1)


def test_a_folder_that_cannot_be_made_stops_the_call_before_the_search(monkeypatch, folder, asked):
    monkeypatch.setattr(autotune, "_milliseconds", never)
    folder.write_text("a file")
    with pytest.raises(FileExistsError):
        tune(1)
