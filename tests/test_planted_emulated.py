"""Bugs planted in the CUDA C++ attention kernels must be caught by the checks of the real ones.

Head dim 64 stands for those whose warps hold all of their keys' gradients.
"""

import pytest
import torch
from attention_checks import Case
from planted_emulated import (
    BOUNDS,
    CONFLICTS,
    INFLIGHT,
    NAN,
    RACE,
    UNINITIALISED,
    WRONG,
    check_case,
    check_caught,
    planted,
)

BF16 = torch.bfloat16

PLAIN = Case((2, 1), (150, 300), 64, BF16)
# Steps of queries that hide something lie on both sides of those that do not.
TALL = Case((1, 1), (300, 290), 64, BF16, "top_left")
CAUSAL = Case((2, 1), (150, 300), 64, BF16, "bottom_right")
GROUPED = Case((4, 2), (150, 300), 64, BF16)
WINDOW = Case((1, 1), (200, 300), 64, BF16, window=(40, 20))
LENGTHS = Case((2, 2), (70, 300), 64, BF16, key_lengths=(150, 0), batch=2)
CAUSAL_LENGTHS = Case((1, 1), (70, 200), 64, BF16, "bottom_right", key_lengths=(150, 40), batch=2)
DROPOUT = Case((2, 2), (100, 200), 64, BF16, dropout_p=0.2)
FORWARD, BACKWARD = "attention/forward_kernel.h", "attention/backward_kernel.h"
KEY_BLOCK = "attention/key_block.h"

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
    "a length does not move the diagonal": (
        "attention/mask.h",
        "s.diagonal = s.key_end - s.queries;",
        "s.diagonal = s.keys - s.queries;",
        CAUSAL_LENGTHS,
        WRONG,
    ),
    "the diagonal at a length is one key off": (
        "attention/mask.h",
        "s.diagonal = s.key_end - s.queries;",
        "s.diagonal = s.key_end - s.queries + (s.key_end < s.keys);",
        CAUSAL_LENGTHS,
        WRONG,
    ),
    "backward: no barrier before a step": (
        BACKWARD,
        "      copy_async_wait<0>();\n      block_barrier();\n      queries.pass_last_turn",
        "      copy_async_wait<0>();\n      queries.pass_last_turn",
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
    "backward: a turn is passed on before all have added": (
        KEY_BLOCK,
        "    if constexpr (!kShared) {\n      at.added_to = visit;",
        "    if (given.dq_turns != nullptr && threadIdx.x == 0) pass_turn(turns(visit));\n"
        "    if constexpr (!kShared) {\n      at.added_to = -1;",
        PLAIN,
        "outside of its turn",
    ),
    "backward: a turn is passed on ahead of the barrier behind its sums": (
        BACKWARD,
        "      block_barrier();\n      queries.pass_last_turn();",
        "      queries.pass_last_turn();\n      block_barrier();",
        PLAIN,
        "before all sums are added",
    ),
    "backward: the tiles below the full ones are taken for full": (
        "attention/backward_order.h",
        "} while (visit >= visits().full_begin);",
        "} while (visit >= 0);",
        TALL,
        WRONG,
    ),
    "backward: the first tile may lack rows, the copies of the second assume none": (
        BACKWARD,
        "if (next >= 0) begin_copies(masked, next, stage ^ 1);",
        "if (next >= 0) begin_copies(Constant<false>(), next, stage ^ 1);",
        GROUPED,
        BOUNDS,
    ),
    "backward: heads of a group share their sums": (
        KEY_BLOCK,
        "member(visit) * static_cast<int>(rows / kBlockM)",
        "member(visit) * 0 * static_cast<int>(rows / kBlockM)",
        GROUPED,
        "does not come",
    ),
    "backward: a turn is passed twice": (
        KEY_BLOCK,
        "threadIdx.x != 0) return;",
        "threadIdx.x > 1) return;",
        PLAIN,
        "not waited for",
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
        "    block_barrier();\n    queries.pass_last_turn();\n",
        "    block_barrier();\n",
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
    "the lse has other units": (
        FORWARD,
        "log2_sum * 0.69314718f",
        "log2_sum",
        PLAIN,
        WRONG,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    *bug, case, how = BUGS[name]
    check_caught(how, check_case, planted(tmp_path, 64, 80, *bug), case)


@pytest.mark.parametrize("architecture", [80, 86])
def test_the_copy_without_a_bug_passes(architecture, tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path, 64, architecture)
    for case in (PLAIN, TALL, CAUSAL, WINDOW, LENGTHS, CAUSAL_LENGTHS, DROPOUT):
        check_case(kernels, case)
