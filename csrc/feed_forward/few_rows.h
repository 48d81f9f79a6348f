// Feed-forward of a few tokens for host code: from tensors to launches, the same for PyTorch and
// for the emulator.
#pragma once

#include <string>

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// act = dropout(activation(x @ w1.T + b1)), times x @ w_up.T inside of dropout where `w_up` is
// given: `x` (tokens, width), `w1` and `w_up` (hidden, width), `b1` (hidden,), `act` (tokens,
// hidden). `pre` and `up`, like `act`, get the products. All but x, w1 and act may be missing.
struct FewRowsHiddenArguments {
  TensorView x, w1, b1, w_up, act, pre, up, seed;
  std::string activation;  // "relu", "gelu", "gelu_tanh" or "silu"
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// y = act @ w2.T + b2: `act` (tokens, hidden), `w2` (out, hidden), `y` (tokens, out), `b2` (out,)
// or missing. `partial` (splits, tokens, out) in float32 says into how many parts hidden is split;
// one if it is missing.
struct FewRowsOutputArguments {
  TensorView act, w2, b2, partial, y;
};

// Check every argument and start kernels on a stream of the current device. Throw
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_few_rows_hidden(const FewRowsHiddenArguments& arguments, Stream stream);
void run_few_rows_output(const FewRowsOutputArguments& arguments, Stream stream);

}  // namespace fuseformer
