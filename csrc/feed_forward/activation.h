// The activation functions, in float32 and few instructions: errors are far below the rounding to
// 16 bits that follows. NaN stays NaN.
#pragma once

#include "../device/math.h"
#include "params.h"

namespace fuseformer {

constexpr float kLog2E = 1.44269504f;

// x times the logistic function of -y ln(2).
FUSEFORMER_DEVICE float gated(float x, float y) {
  return x * reciprocal_approximate(1.0f + exp2_approximate(y));
}

// x times the normal distribution function: the positive part of x less |x| times the upper tail at
// |x|. The polynomial is the logarithm of that tail to base 2, fitted to differ by at most 4e-5
// from it up to 5.5, where the product is below the least number of 16 bits; further out it stays
// what it is there. The result errs by at most 4e-6, and by 3e-5 of itself where it is above 1e-4.
FUSEFORMER_DEVICE float gelu(float x) {
  const float z = minimum(absolute(x), 5.5f);
  float tail = 2.6153728e-5f;
  tail = tail * z - 6.6098111e-4f;
  tail = tail * z + 7.4883103e-3f;
  tail = tail * z - 5.1970415e-2f;
  tail = tail * z - 4.6032944e-1f;
  tail = tail * z - 1.1505840f;
  tail = tail * z - 1.0000360f;
  return maximum_or_nan(x, 0.0f) - z * exp2_approximate(tail);
}

// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, whose tanh form is x times the
// logistic function of twice the argument of tanh; Elfwing et al., "Sigmoid-Weighted Linear Units",
// 2017.
template <Activation kActivation>
FUSEFORMER_DEVICE float activate(float x) {
  if constexpr (kActivation == Activation::kRelu) {
    return maximum_or_nan(x, 0.0f);
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr float kLinear = -1.5957691f * kLog2E;  // -2 sqrt(2 / pi)
    return gated(x, x * (x * x * (kLinear * 0.044715f) + kLinear));
  } else {
    return gated(x, x * -kLog2E);
  }
}

}  // namespace fuseformer
