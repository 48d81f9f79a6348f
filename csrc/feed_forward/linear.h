// The epilogue regime of feed-forward for host code: from tensors to launches, the same for PyTorch
// and for the emulator.
#pragma once

#include <string>

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// act = dropout(activation(x @ w.T + bias)): `x` (tokens, width), `w` (hidden, width), `act` and
// `pre` (tokens, hidden). `bias` (hidden,), `pre` and `seed` may be missing.
struct LinearArguments {
  TensorView x, w, bias, act, pre, seed;
  std::string activation;  // "relu", "gelu", "gelu_tanh" or "silu"
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// `dact` (tokens, hidden) becomes the gradient before the activation, `pre` like it the activation
// after dropout, and `dbias` (row blocks, hidden), where it is given, gets sums over rows.
struct ActivationGradientArguments {
  TensorView dact, pre, dbias, seed;
  std::string activation;
  int64_t dropout_threshold = 0;
  double dropout_scale = 1.0;
};

// Check every argument and start a kernel on a stream of the current device. Throw
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_linear_activation(const LinearArguments& arguments, Stream stream);
void run_activation_gradient(const ActivationGradientArguments& arguments, Stream stream);

}  // namespace fuseformer
