"""Runs kernels in an emulator built with AddressSanitizer and UndefinedBehaviorSanitizer.

``python sanitized.py kernels`` runs attention, decode and feed-forward in bfloat16, ``python
sanitized.py NAME`` a self test of the emulator. Either sanitizer ends the process where it finds
something.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from attention_checks import Case, check_dense, check_packed
from block_checks import FeedForwardCase, check_feed_forward
from decode_checks import Case as DecodeCase
from decode_checks import check_decode
from emulated import Kernels
from emulator_build import SOURCES, build, build_feed_forward
from emulator_checks import run
from emulator_units import attention_unit, feed_forward_unit
from gated_checks import GatedCase, check_gated

LANDINGS = ("late", "early", "random")


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this file in a process of its own that has the sanitizers loaded."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True)
        for name in ("libasan", "libubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(done.stdout.strip() for done in libraries),
        # Python keeps what it has to its end; and the stacks of fibers are the emulator's own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


FEED_FORWARD = feed_forward_unit(
    *("linear_activation", "activation_gradient", "gated_activation", "gated_gradient"),
    *("few_rows_hidden", "few_rows_output"),
    text="""
template <>
const char* feed_forward_forward<Bfloat16>(const FeedForwardParams& params, int width, Activation,
                                           Stream stream) {
  using Wide = FeedForwardConfig<Bfloat16, 128>;
  if (width == 128) return launch_feed_forward<Wide, Activation::kRelu>(params, stream);
  return launch_feed_forward<FeedForwardConfig<Bfloat16, 64>, Activation::kGelu>(params, stream);
}
template <>
const char* feed_forward_backward<Bfloat16>(const FeedForwardGradientParams& given, int width,
                                            Stream stream) {
  using Wide = FeedForwardBackwardConfig<Bfloat16, 128>;
  using Relu = ActivationConstant<Activation::kRelu>;
  if (width == 128) return launch_feed_forward_backward<Wide, Relu>(given, stream);
  using Traits = FeedForwardBackwardConfig<Bfloat16, 64>;
  return launch_feed_forward_backward<Traits, SmoothActivation>(given, stream);
}
""",
)


def _run_kernels() -> None:
    bf16 = torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        units = [Path(folder) / f"{name}.cpp" for name in ("attention", "feed_forward")]
        units[0].write_text(attention_unit([32, 64, 96, 128, 256], decode=True))
        units[1].write_text(FEED_FORWARD)
        attention = Kernels(build("sanitized", units[0]))
        feed_forward = Kernels(build_feed_forward("sanitized", units[1]))
    for seed, landing in enumerate(LANDINGS, 1):
        for architecture in (80, 86):
            attention.emulator.set_options(True, seed, landing, "exact", architecture)
            check_dense(attention, Case((1, 1), (65, 130), 128, bf16, key_lengths=(77,)))
            check_dense(attention, Case((1, 1), (33, 70), 256, bf16, window=(20, 10)))
        check_dense(attention, Case((1, 1), (63, 113), 32, bf16, dropout_p=0.2))
        check_dense(attention, Case((2, 1), (113, 70), 64, bf16, "top_left", 0.1))
        check_packed(attention, ((70, 33), (0, 5), (17, 0)), 96, bf16, "bottom_right", 0.2, 5)
        check_decode(attention, DecodeCase((4, 2), 2, 32, bf16, page_size=16))
        check_decode(attention, DecodeCase((2, 1), 17, 32, bf16, (9, 113), capacity=120))
        feed_forward.emulator.set_options(True, seed, landing, "exact", 80)
        check_feed_forward(feed_forward, FeedForwardCase((70, 64, 136, 64), "gelu", bf16, 0.2))
        check_feed_forward(feed_forward, FeedForwardCase((70, 128, 136, 128), "relu", bf16))
        check_feed_forward(feed_forward, FeedForwardCase((33, 40, 104, 24), "silu", bf16))
        check_feed_forward(feed_forward, FeedForwardCase((5, 40, 72, 40), "relu", bf16))
        check_gated(feed_forward, GatedCase((33, 40, 72, 24), "silu", bf16, 0.2))
        print(f"{landing}: clean", flush=True)


def _run_self_test(name: str) -> None:
    unit = SOURCES / "emulator" / "self_test_kernels.cpp"
    emulator = build("sanitized", unit, bindings="self_test_bindings", host=())
    out, _, errors = run(emulator, name)
    print(f"{name}: ran to its end {out.tolist()} {errors}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "kernels":
        _run_kernels()
    else:
        _run_self_test(sys.argv[1])
