// The activation functions, in float32 and few instructions: errors are far below the rounding to
// 16 bits that follows. NaN stays NaN.
#pragma once

#include <type_traits>

#include "../device/math.h"
#include "params.h"

namespace fuseformer {

// An activation that a generic lambda can take as an argument and know while it is compiled.
template <Activation kValue>
struct ActivationConstant {
  static constexpr Activation value = kValue;
};

constexpr float kLog2E = 1.44269504f;

// Calls `function` with the activation as a constant: outside of loops a branch costs nothing, and
// spares three kernels of four.
template <typename Function>
FUSEFORMER_DEVICE void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kRelu:
      function(ActivationConstant<Activation::kRelu>());
      break;
    case Activation::kGelu:
      function(ActivationConstant<Activation::kGelu>());
      break;
    case Activation::kGeluTanh:
      function(ActivationConstant<Activation::kGeluTanh>());
      break;
    default:
      function(ActivationConstant<Activation::kSilu>());
  }
}

// Every activation but relu: a kernel that is bound by their arithmetic has them all.
struct SmoothActivation {};

// The same for an activation that is among those of `Kind`: one as a constant, or the smooth ones.
template <typename Kind, typename Function>
FUSEFORMER_DEVICE void with_activation_of(Activation activation, const Function& function) {
  if constexpr (!std::is_same_v<Kind, SmoothActivation>) {
    function(Kind());
  } else if (activation == Activation::kGelu) {
    function(ActivationConstant<Activation::kGelu>());
  } else if (activation == Activation::kGeluTanh) {
    function(ActivationConstant<Activation::kGeluTanh>());
  } else {
    function(ActivationConstant<Activation::kSilu>());
  }
}

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

FUSEFORMER_DEVICE float sigmoid(float x) {
  return reciprocal_approximate(1.0f + exp2_approximate(-1.44269504f * x));
}

// The normal distribution function, and exp(-x^2 / 2), which comes with it.
//
// Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26, whose error is at
// most 1.5e-7.
FUSEFORMER_DEVICE float normal_below(float x, float& bell) {
  const float size = absolute(x);
  bell = exp2_approximate(-0.72134752f * x * x);
  const float t = reciprocal_approximate(1.0f + 0.23164188f * size);
  float tail = 0.53070272f;
  tail = tail * t - 0.72657602f;
  tail = tail * t + 0.71070688f;
  tail = tail * t - 0.14224837f;
  tail = tail * t + 0.12741479f;
  tail *= t * bell;
  return x < 0.0f ? tail : 1.0f - tail;
}

// Returns the activation of x, and its derivative in `slope`.
template <Activation kActivation>
FUSEFORMER_DEVICE float activate_with_slope(float x, float& slope) {
  if constexpr (kActivation == Activation::kRelu) {
    slope = x > 0.0f ? 1.0f : 0.0f;
    return maximum_or_nan(x, 0.0f);
  } else if constexpr (kActivation == Activation::kGelu) {
    float bell;
    const float below = normal_below(x, bell);
    slope = below + x * 0.39894228f * bell;
    return x * below;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 is sigmoid(2 u).
    const float square = x * x;
    const float gate = sigmoid(1.59576912f * x * (1.0f + 0.044715f * square));
    const float y = x * gate;
    slope = gate + y * (1.0f - gate) * 1.59576912f * (1.0f + 0.134145f * square);
    return y;
  } else {
    static_assert(kActivation == Activation::kSilu);
    const float gate = sigmoid(x), y = x * gate;
    slope = gate + y * (1.0f - gate);
    return y;
  }
}

}  // namespace fuseformer
