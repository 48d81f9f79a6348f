"""Bugs planted in the CUDA C++ kernels must be caught by the checks of the real ones."""

import pytest
import torch
from attention_checks import Case, check_dense
from emulated import EmulatorError, Kernels
from emulator_build import build, build_planted

BF16 = torch.bfloat16

# Head dim 64, which keeps operands in registers, or 256, where warps share it, alone: what is
# planted is compiled for each bug.
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

PLAIN = Case((2, 1), (150, 300), 64, BF16)
CAUSAL = Case((2, 1), (150, 300), 64, BF16, "bottom_right")
WINDOW = Case((1, 1), (200, 300), 64, BF16, window=(40, 20))
LENGTHS = Case((2, 2), (70, 300), 64, BF16, key_lengths=(150, 0), batch=2)
DROPOUT = Case((2, 2), (100, 200), 64, BF16, dropout_p=0.2)
FORWARD, BACKWARD = "attention/forward_kernel.h", "attention/backward_kernel.h"
WIDE, KEY_BLOCK = "attention/backward_wide_kernel.h", "attention/key_block.h"
WIDE_WARP = "attention/backward_wide_warp.h"
WIDE_PLAIN = Case((2, 1), (150, 100), 256, BF16)
WIDE_CAUSAL = Case((1, 1), (70, 150), 256, BF16, "top_left")
WIDE_DROPOUT = Case((1, 1), (70, 100), 256, BF16, dropout_p=0.2)
WRONG, RACE, INFLIGHT, BOUNDS = "exceeds", "race: ", "copy is on its way", "out of bounds"
UNINITIALISED, CONFLICTS, NAN = "nobody has written", "bank conflicts", "are NaN"

# file, correct text, planted text, the case that must fail, and how
BUGS = {
    "forward: no barrier before a step": (
        FORWARD,
        "    copy_async_wait<0>();\n    block_barrier();\n    if constexpr (Traits::kStages == 2)",
        "    copy_async_wait<0>();\n    if constexpr (Traits::kStages == 2)",
        PLAIN,
        RACE,
    ),
    "forward: the copies of a step are not waited for": (
        FORWARD,
        "    copy_async_wait<0>();\n    block_barrier();\n    if constexpr (Traits::kStages == 2)",
        "    copy_async_wait<1>();\n    block_barrier();\n    if constexpr (Traits::kStages == 2)",
        PLAIN,
        INFLIGHT,
    ),
    "forward: no barrier before queries are read": (
        FORWARD,
        "    copy_async_wait<0>();\n    block_barrier();\n    FUSEFORMER_UNROLL",
        "    copy_async_wait<0>();\n    FUSEFORMER_UNROLL",
        PLAIN,
        RACE,
    ),
    "forward: no barrier of the warp before the output is read": (
        FORWARD,
        "  warp_barrier();\n",
        "",
        PLAIN,
        RACE,
    ),
    "forward: rows past the last are written": (
        FORWARD,
        "if (block_row + row < sequence.queries) {",
        "if (true) {",
        PLAIN,
        BOUNDS,
    ),
    "forward: keys past the last are read": (
        FORWARD,
        "k_copy.begin_bounded(k_tile, k_rows + steps.at(0) * k_step, sequence.key_end - first_key)",
        "k_copy.begin(k_tile, k_rows + steps.at(0) * k_step)",
        PLAIN,
        BOUNDS,
    ),
    "forward: values lie past the shared memory": (
        FORWARD,
        "v_tile = k_tile + Traits::kStages * kTileBytes",
        "v_tile = k_tile + (Traits::kStages + 1) * kTileBytes",
        PLAIN,
        BOUNDS,
    ),
    "forward: every head reads its own keys": (
        FORWARD,
        "k_rows = rows_of(params.k, head / params.group,",
        "k_rows = rows_of(params.k, head,",
        PLAIN,
        BOUNDS,
    ),
    "forward: the output does not begin at 0": (
        FORWARD,
        "warp.out[tile][i][j] = 0.0f;",
        "(void)j;",
        PLAIN,
        NAN,
    ),
    "forward: the output is not rescaled": (
        "attention/softmax.h",
        "          out[tile][i][2 * half] *= rescale;\n",
        "",
        PLAIN,
        WRONG,
    ),
    "forward: the sum is not rescaled": (
        "attention/softmax.h",
        "sum[tile][half] * rescale + added",
        "sum[tile][half] + added",
        PLAIN,
        WRONG,
    ),
    "two registers of an operand are exchanged": (
        "device/mma.h",
        "  a[1] = pack<Element>(d[2 * step][2], d[2 * step][3]);\n"
        "  a[2] = pack<Element>(d[2 * step + 1][0], d[2 * step + 1][1]);",
        "  a[2] = pack<Element>(d[2 * step][2], d[2 * step][3]);\n"
        "  a[1] = pack<Element>(d[2 * step + 1][0], d[2 * step + 1][1]);",
        PLAIN,
        WRONG,
    ),
    "tiles are not swizzled": (
        "device/tile.h",
        "return kWhole ? row & 7 : row >> 1 & 3;",
        "return row & 0;",
        PLAIN,
        CONFLICTS,
    ),
    "copies are swizzled otherwise than loads": (
        "device/tile.h",
        "target = Layout::offset(row, thread % kAcross);",
        "target = Layout::offset(row, thread % kAcross) ^ 16;",
        PLAIN,
        WRONG,
    ),
    "the causal mask hides one key less": (
        "attention/mask.h",
        "return key >= begin && key < end;",
        "return key >= begin && key <= end;",
        CAUSAL,
        WRONG,
    ),
    "the window hides one key more": (
        "attention/mask.h",
        "return key >= begin && key < end;",
        "return key > begin && key < end;",
        WINDOW,
        WRONG,
    ),
    "forward: a step at the diagonal counts as full": (
        "attention/mask.h",
        "minimum(steps.end, maximum(all_end, 0) / kSize)",
        "minimum(steps.end, maximum(all_end, 0) / kSize + 1)",
        CAUSAL,
        WRONG,
    ),
    "backward: a step at the diagonal counts as full": (
        "attention/mask.h",
        "(maximum(all_begin, 0) + kSize - 1) / kSize",
        "maximum(all_begin, 0) / kSize",
        CAUSAL,
        WRONG,
    ),
    "lengths are not looked at": (
        "attention/mask.h",
        "if (params.key_lengths != nullptr) {",
        "if (false) {",
        LENGTHS,
        WRONG,
    ),
    "backward: no barrier before a step": (
        BACKWARD,
        "      copy_async_wait<0>();\n      block_barrier();\n      if (given.dq_turns",
        "      copy_async_wait<0>();\n      if (given.dq_turns",
        PLAIN,
        INFLIGHT,
    ),
    "backward: no barrier before dS is read": (
        BACKWARD,
        "      block_barrier();\n      if constexpr (Traits::kStages == 1)",
        "      if constexpr (Traits::kStages == 1)",
        PLAIN,
        RACE,
    ),
    "backward: half of lse and delta are not copied": (
        KEY_BLOCK,
        "if (thread < kBlockM / 4) {",
        "if (thread < kBlockM / 8) {",
        PLAIN,
        UNINITIALISED,
    ),
    "backward: dq is summed without atomics": (
        BACKWARD,
        "atomic_add(sums + (4 * i + j) * Traits::kThreads, dq[i][j]);",
        "sums[(4 * i + j) * Traits::kThreads] += dq[i][j];",
        PLAIN,
        RACE,
    ),
    "backward: a turn is passed twice": (
        BACKWARD,
        "thread == 0) pass_turn(queries.turns(added_to));",
        "thread < 2) pass_turn(queries.turns(added_to));",
        PLAIN,
        "does not come",
    ),
    "backward: no turn is waited for": (
        BACKWARD,
        "if (given.dq_turns != nullptr && thread == 0) {",
        "if (false) {",
        PLAIN,
        "not waited for",
    ),
    "backward: the last turn is not passed on": (
        BACKWARD,
        "    block_barrier();\n    if (given.dq_turns != nullptr && thread == 0)",
        "    block_barrier();\n    if (false)",
        PLAIN,
        "does not come",
    ),
    "backward: delta is left out": (
        BACKWARD,
        "kDropout ? 0.0f : -row_values[kBlockM + 8 * i + j % 2]",
        "0.0f",
        PLAIN,
        WRONG,
    ),
    "backward: dropout takes the words of the other keys": (
        BACKWARD,
        "const bool upper = key / 16 % 2;",
        "const bool upper = key / 16 % 2 == 0;",
        DROPOUT,
        WRONG,
    ),
    "backward: dq is added by the columns of another warp": (
        BACKWARD,
        "in_row_order(shared, place.lane, place.warp / kRowTiles)",
        "in_row_order(shared, place.lane)",
        PLAIN,
        WRONG,
    ),
    "wide: no barrier before a step": (
        WIDE,
        "      copy_async_wait<1>();\n      block_barrier();\n",
        "      copy_async_wait<1>();\n",
        WIDE_PLAIN,
        INFLIGHT,
    ),
    "wide: the queries of a step are not waited for": (
        WIDE,
        "copy_async_wait<1>();",
        "copy_async_wait<2>();",
        WIDE_PLAIN,
        INFLIGHT,
    ),
    "wide: dout is not waited for": (
        WIDE,
        "copy_async_wait<0>();\n      block_barrier();\n      // Without",
        "copy_async_wait<1>();\n      block_barrier();\n      // Without",
        WIDE_PLAIN,
        INFLIGHT,
    ),
    "wide: no barrier before dout is read": (
        WIDE,
        "      block_barrier();\n      // Without",
        "      // Without",
        WIDE_PLAIN,
        INFLIGHT,
    ),
    "wide: no barrier before probabilities and dS are read": (
        WIDE,
        "      block_barrier();\n      warp.add_product(warp.dk",
        "      warp.add_product(warp.dk",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: queries are overwritten before all have read them": (
        WIDE,
        "      block_barrier();\n      if (next >= 0) begin_queries",
        "      if (next >= 0) begin_queries",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: dout is overwritten before all have read it": (
        WIDE,
        "      block_barrier();\n      if (next >= 0) begin_dout",
        "      if (next >= 0) begin_dout",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: the next head begins before all have left this one": (
        WIDE,
        "    block_barrier();\n    if (given.dq_turns",
        "    if (given.dq_turns",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: no barrier before what steps have in common is read": (
        KEY_BLOCK,
        "at;\n      block_barrier();\n",
        "at;\n",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: a block that nobody sees does not wait for its keys": (
        WIDE,
        "  copy_async_wait<0>();\n  block_barrier();\n  const Place",
        "  const Place",
        WIDE_CAUSAL,
        INFLIGHT,
    ),
    "wide: no barrier before rows of dk and dv are written": (
        WIDE,
        "  block_barrier();\n  write_key_gradients",
        "  write_key_gradients",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: columns of a fragment are exchanged": (
        WIDE_WARP,
        "(sums[2 * pair], a, b[0], b[1]);",
        "(sums[2 * pair], a, b[2], b[3]);",
        WIDE_PLAIN,
        WRONG,
    ),
    "wide: queries past the last are read": (
        KEY_BLOCK,
        "if constexpr (kBounded) {",
        "if constexpr (false) {",
        WIDE_PLAIN,
        BOUNDS,
    ),
    "wide: keys past the last are written": (
        KEY_BLOCK,
        "if (block.key + row < block.sequence.keys) {",
        "if (true) {",
        WIDE_PLAIN,
        BOUNDS,
    ),
    "wide: the mask is one key off": (
        WIDE,
        "kept().block.sequence, row, key)",
        "kept().block.sequence, row, key + 1)",
        WIDE_CAUSAL,
        WRONG,
    ),
    "wide: dq is summed without atomics": (
        WIDE,
        "atomic_add(sums + index * Traits::kThreads, dq[i][j]);",
        "sums[index * Traits::kThreads] += dq[i][j];",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: no turn is waited for": (
        WIDE,
        "if (given.dq_turns != nullptr && thread == 0) {",
        "if (false) {",
        WIDE_PLAIN,
        "not waited for",
    ),
    "wide: dropout takes the words of other keys": (
        WIDE_WARP,
        "words[(i + 2) % 4] : words[i];",
        "words[(i + 2) % 4] : words[(i + 1) % 4];",
        WIDE_DROPOUT,
        WRONG,
    ),
    "wide: small: no barrier before the kept values are read": (
        WIDE,
        "      copy_async_wait<0>();\n      block_barrier();\n      const Place",
        "      copy_async_wait<0>();\n      const Place",
        WIDE_PLAIN,
        RACE,
    ),
    "wide: small: other columns of values are kept": (
        WIDE,
        "v_rows + 2 * kReadColumns",
        "v_rows",
        WIDE_PLAIN,
        WRONG,
    ),
    "the lse has other units": (
        FORWARD,
        "log2_sum * 0.69314718f",
        "log2_sum",
        PLAIN,
        WRONG,
    ),
}


def planted(folder, file="attention/mask.h", correct="", wrong="", head_dim=64):
    """Return the kernels with a text replaced in one file, every access being checked."""
    unit = KERNELS.replace("Bfloat16, 64", f"Bfloat16, {head_dim}")
    return Kernels(build_planted(build, unit, folder, file, correct, wrong))


def run(kernels, case):
    """Raise an error for whatever is wrong with a case: errors, then values, then conflicts."""
    check_dense(kernels, case)
    assert kernels.counters["ldmatrix_conflicts"] == 0, "bank conflicts"
    assert kernels.counters["shared_conflicts"] == 0, "bank conflicts of plain accesses"


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    file, correct, wrong, case, how = BUGS[name]
    kernels = planted(tmp_path, file, correct, wrong, case.head_dim)
    if "small" in name:
        kernels.emulator.set_options(True, 1, "late", "exact", 86)
    with pytest.raises(AssertionError) as caught:
        run(kernels, case)
    assert how in str(caught.value)
    assert isinstance(caught.value, EmulatorError) == (how not in (WRONG, CONFLICTS, NAN))


@pytest.mark.parametrize(
    "cases", [(PLAIN, CAUSAL, WINDOW, LENGTHS, DROPOUT), (WIDE_PLAIN, WIDE_CAUSAL, WIDE_DROPOUT)]
)
@pytest.mark.parametrize("architecture", [80, 86])
def test_the_copy_without_a_bug_passes(cases, architecture, tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path, head_dim=cases[0].head_dim)
    kernels.emulator.set_options(True, 1, "late", "exact", architecture)
    for case in cases:
        run(kernels, case)
