// Gated feed-forward blocks in the epilogue regime for host code: from tensors to launches, the
// same for PyTorch and for the emulator.
#pragma once

#include <string>

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// act = dropout(activation(x @ w_gate.T) * (x @ w_up.T)): `x` (tokens, width), `w_gate` and `w_up`
// (hidden, width) with rows equally far apart, `act` (tokens, hidden). `gate_pre` and `up` like it
// get the products; both may be missing, and so may `seed`.
struct GatedArguments {
  TensorView x, w_gate, w_up, act, gate_pre, up, seed;
  std::string activation;  // "relu", "gelu", "gelu_tanh" or "silu"
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// `dact` (tokens, hidden) becomes the gradient of `gate_pre`. `dup` and `act`, like it and all
// others, get the gradient of `up` and the activation after dropout.
struct GatedGradientArguments {
  TensorView dact, gate_pre, up, dup, act, seed;
  std::string activation;
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// Check every argument and start a kernel on a stream of the current device. Throw
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_gated_activation(const GatedArguments& arguments, Stream stream);
void run_gated_gradient(const GatedGradientArguments& arguments, Stream stream);

}  // namespace fuseformer
