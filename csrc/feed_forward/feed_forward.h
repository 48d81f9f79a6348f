// Feed-forward blocks for host code: from tensors to launches, the same for PyTorch and for the
// emulator.
#pragma once

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// x and y are (tokens, width), w1 (hidden, width) and contiguous, w2 (width, hidden), b1 (hidden,)
// and b2 (width,) or not given. `activation` is "relu", "gelu", "gelu_tanh" or "silu". Dropout of
// the hidden units is on where `seed` is given.
struct FeedForwardArguments {
  TensorView x, w1, b1, w2, b2, y;
  TensorView seed;
  std::string activation;
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// Checks every argument and starts the kernel on a stream of the current device. Throws
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_feed_forward_forward(const FeedForwardArguments& arguments, Stream stream);

}  // namespace fuseformer
