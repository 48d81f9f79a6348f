// Attention for host code: from tensors to launches, the same for PyTorch and for the emulator.
#pragma once

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// The sequences are packed where `cu_seqlens_q` and `cu_seqlens_k` are given: tensors are then
// (rows, heads, head_dim) and lse (heads, rows), else (batch, heads, rows, head_dim) and (batch,
// heads, rows). Windows are -1 where they hide nothing. Dropout is on where `seed` is given.
struct AttentionArguments {
  TensorView q, k, v, out, lse;
  TensorView key_lengths, cu_seqlens_q, cu_seqlens_k, seed;
  int64_t max_seqlen_q = 0;  // of packed sequences
  int64_t max_seqlen_k = 0;
  int64_t window_left = -1;
  int64_t window_right = -1;
  bool bottom_right = false;
  double scale = 1.0;
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// The workspaces hold `workspace_rows` for each head: whole steps of queries, whose number of rows
// `backward_step_rows` tells, for each sequence.
struct AttentionGradientArguments : AttentionArguments {
  TensorView dout, dlse, dq, dk, dv;
  TensorView lse_log2;  // (heads, workspace rows)
  TensorView delta;     // (heads, workspace rows)
  TensorView dq_sums;   // (heads, workspace rows, head_dim), zeros
  TensorView dq_turns;  // (heads, workspace rows / step), zeros; without it dq may differ in its
                        // last bits from run to run
};

// Check every argument and start the kernels on a stream of the current device. Throw
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_attention_forward(const AttentionArguments& arguments, Stream stream);
void run_attention_backward(const AttentionGradientArguments& arguments, Stream stream);

// The rows of a step of queries in the backward pass on the current device, 0 where there is no
// backward kernel.
int attention_step_rows(int64_t head_dim, DType dtype);

}  // namespace fuseformer
