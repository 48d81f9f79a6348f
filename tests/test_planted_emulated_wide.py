"""Bugs planted in the attention backward pass at head dim 256, in CUDA C++: warps share the dim."""

import pytest
import torch
from attention_checks import Case
from planted_emulated import (
    BOUNDS,
    INFLIGHT,
    RACE,
    WRONG,
    check_case,
    check_caught,
    planted,
)

BF16 = torch.bfloat16

KERNEL, KEY_BLOCK = "attention/backward_wide_kernel.h", "attention/key_block.h"
WARP = "attention/backward_wide_warp.h"
PLAIN = Case((2, 1), (150, 100), 256, BF16)
CAUSAL = Case((1, 1), (70, 150), 256, BF16, "top_left")
DROPOUT = Case((1, 1), (70, 100), 256, BF16, dropout_p=0.2)

# file, correct text, planted text, the case that must fail, and how
BUGS = {
    "no barrier before a step": (
        KERNEL,
        "      copy_async_wait<1>();\n      block_barrier();\n",
        "      copy_async_wait<1>();\n",
        PLAIN,
        INFLIGHT,
    ),
    "the queries of a step are not waited for": (
        KERNEL,
        "copy_async_wait<1>();",
        "copy_async_wait<2>();",
        PLAIN,
        INFLIGHT,
    ),
    "dout is not waited for": (
        KERNEL,
        "copy_async_wait<0>();\n      block_barrier();\n      // Without",
        "copy_async_wait<1>();\n      block_barrier();\n      // Without",
        PLAIN,
        INFLIGHT,
    ),
    "no barrier before dout is read": (
        KERNEL,
        "      block_barrier();\n      // Without",
        "      // Without",
        PLAIN,
        INFLIGHT,
    ),
    "no barrier before probabilities and dS are read": (
        KERNEL,
        "      block_barrier();\n      warp.add_product(warp.dk",
        "      warp.add_product(warp.dk",
        PLAIN,
        RACE,
    ),
    "queries are overwritten before all have read them": (
        KERNEL,
        "      block_barrier();\n      if (next >= 0) begin_queries",
        "      if (next >= 0) begin_queries",
        PLAIN,
        RACE,
    ),
    "dout is overwritten before all have read it": (
        KERNEL,
        "      block_barrier();\n      if (next >= 0) begin_dout",
        "      if (next >= 0) begin_dout",
        PLAIN,
        RACE,
    ),
    "the last turn is passed on ahead of the barrier behind its sums": (
        KERNEL,
        "    block_barrier();\n    queries.pass_last_turn",
        "    queries.pass_last_turn",
        PLAIN,
        "before all sums are added",
    ),
    "no barrier before what visits have in common is read": (
        KEY_BLOCK,
        "at;\n      block_barrier();\n",
        "at;\n",
        PLAIN,
        RACE,
    ),
    "a block that nobody sees does not wait for its keys": (
        KERNEL,
        "  copy_async_wait<0>();\n  block_barrier();\n  const Place",
        "  const Place",
        CAUSAL,
        INFLIGHT,
    ),
    "no barrier before rows of dk and dv are written": (
        KERNEL,
        "  block_barrier();\n  write_key_gradients",
        "  write_key_gradients",
        PLAIN,
        RACE,
    ),
    "columns of a fragment are exchanged": (
        WARP,
        "(sums[2 * pair], a, b[0], b[1]);",
        "(sums[2 * pair], a, b[2], b[3]);",
        PLAIN,
        WRONG,
    ),
    "queries past the last are read": (
        KEY_BLOCK,
        "if constexpr (kBounded) {",
        "if constexpr (false) {",
        PLAIN,
        BOUNDS,
    ),
    "keys past the last are written": (
        KEY_BLOCK,
        "if (block.key + row < block.sequence.keys) {",
        "if (true) {",
        PLAIN,
        BOUNDS,
    ),
    "the mask is one key off": (
        KERNEL,
        "kept().block.sequence, row, key)",
        "kept().block.sequence, row, key + 1)",
        CAUSAL,
        WRONG,
    ),
    "dq is summed without atomics": (
        KERNEL,
        "atomic_add(sums + index * Traits::kThreads, dq[i][j]);",
        "sums[index * Traits::kThreads] += dq[i][j];",
        PLAIN,
        RACE,
    ),
    "no turn is waited for": (
        KERNEL,
        "if (given.dq_turns != nullptr && thread == 0) {",
        "if (false) {",
        PLAIN,
        "not waited for",
    ),
    "dropout takes the words of other keys": (
        WARP,
        "words[(i + 2) % 4] : words[i];",
        "words[(i + 2) % 4] : words[(i + 1) % 4];",
        DROPOUT,
        WRONG,
    ),
    "small: no barrier before the kept values are read": (
        KERNEL,
        "      copy_async_wait<0>();\n      block_barrier();\n      const Place",
        "      copy_async_wait<0>();\n      const Place",
        PLAIN,
        RACE,
    ),
    "small: other columns of values are kept": (
        KERNEL,
        "v_rows + 2 * kReadColumns",
        "v_rows",
        PLAIN,
        WRONG,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name, tmp_path):
    *bug, case, how = BUGS[name]
    check_caught(how, check_case, planted(tmp_path, 256, 86 if "small" in name else 80, *bug), case)


@pytest.mark.parametrize("architecture", [80, 86])
def test_the_copy_without_a_bug_passes(architecture, tmp_path):
    """Else the tests above would pass for any reason at all."""
    kernels = planted(tmp_path, 256, architecture)
    for case in (PLAIN, CAUSAL, DROPOUT):
        check_case(kernels, case)
