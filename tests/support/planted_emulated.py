"""The CUDA C++ attention kernels of one head dim with a bug planted, and what is said of it."""

import pytest
from attention_checks import check_dense
from emulated import EmulatorError, Kernels
from emulator_build import build, build_planted

WRONG, RACE, INFLIGHT, BOUNDS = "exceeds", "race: ", "copy is on its way", "out of bounds"
UNINITIALISED, CONFLICTS, NAN = "nobody has written", "bank conflicts", "are NaN"

# One head dim alone: what is planted is compiled for each bug.
KERNELS = """
#include "attention/decode_launch.h"
#include "attention/launch.h"
namespace fuseformer {
template <>
const char* attention_forward<Bfloat16>(const AttentionParams& params, int, Stream stream) {
  return forward_of<Bfloat16, 64>(params, stream);
}
template <>
const char* attention_backward<Bfloat16>(const AttentionGradientParams& given, int, Stream stream) {
  return backward_of<Bfloat16, 64>(given, stream);
}
template <>
int backward_step_rows<Bfloat16>(int) {
  return with_backward_traits<Bfloat16, 64>([](auto traits) { return decltype(traits)::kBlockM; });
}
template <>
int backward_step_rows<Half>(int) {
  return 0;
}
template <>
const char* attention_forward<Half>(const AttentionParams&, int, Stream) { return "not built"; }
template <>
const char* attention_backward<Half>(const AttentionGradientParams&, int, Stream) {
  return "not built";
}
template <>
const char* attention_decode<Bfloat16>(const DecodeParams&, int, Stream) { return "not built"; }
template <>
const char* attention_decode<Half>(const DecodeParams&, int, Stream) { return "not built"; }
}  // namespace fuseformer
"""


def planted(folder, head_dim, architecture=80, file="attention/mask.h", correct="", wrong=""):
    """Return the kernels with a text replaced in one file, every access being checked."""
    unit = KERNELS.replace("Bfloat16, 64", f"Bfloat16, {head_dim}")
    kernels = Kernels(build_planted(build, unit, folder, file, correct, wrong))
    kernels.emulator.set_options(True, 1, "late", "exact", architecture)
    return kernels


def run(kernels, case):
    """Raise an error for whatever is wrong with a case: errors, then values, then conflicts."""
    check_dense(kernels, case)
    assert kernels.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert kernels.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"


def check_caught(kernels, case, how):
    """Fail unless the case fails as it must."""
    with pytest.raises(AssertionError) as caught:
        run(kernels, case)
    assert how in str(caught.value)
    assert isinstance(caught.value, EmulatorError) == (how not in (WRONG, CONFLICTS, NAN))
