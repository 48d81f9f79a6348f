// The resident regime's backward pass for host code: from tensors to launches, the same for PyTorch
// and for the emulator.
#pragma once

#include "../device/stream.h"
#include "feed_forward.h"

namespace fuseformer {

// dy and dx are like x; dw1, dw2 and db1, which may be missing, like w1, w2 and b1, and contiguous.
// The others are workspaces in float32: `dx_sums` (parts, steps, tokens of a step, width), zeros at
// first, as are `turns` (parts, steps), in int32; `weight_sums` (splits, 2, hidden, width) and
// `bias_sums` (splits, hidden), of any contents.
struct FeedForwardGradientArguments {
  TensorView dy, x, w1, b1, w2, dx, dw1, db1, dw2, dx_sums, turns, weight_sums, bias_sums;
  TensorView seed;
  std::string activation;
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// Checks every argument and starts the kernels on a stream of the current device. Throws
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_feed_forward_backward(const FeedForwardGradientArguments& arguments, Stream stream);

// The tokens of a step, and the hidden units of a block, of that pass on the current device; 0
// where it has no kernel of this width or dtype.
int64_t feed_forward_step_tokens(int64_t width, DType dtype);
int64_t feed_forward_block_units(int64_t width, DType dtype);

}  // namespace fuseformer
