// The activation functions of feed-forward kernels, with their derivatives.
//
// Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Elfwing et al.,
// "Sigmoid-Weighted Linear Units", 2017; erf after Abramowitz and Stegun, "Handbook of Mathematical
// Functions", 7.1.26, whose error is at most 1.5e-7.
#pragma once

#include "../device/math.h"
#include "params.h"

namespace fuseformer {

// An activation that a generic lambda can take as an argument and know while it is compiled.
template <Activation kValue>
struct ActivationConstant {
  static constexpr Activation value = kValue;
};

FUSEFORMER_DEVICE float sigmoid(float x) {
  return reciprocal_approximate(1.0f + exp2_approximate(-1.44269504f * x));
}

// (1 + erf(x / sqrt(2))) / 2, and exp(-x^2 / 2), which comes with it.
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

// Returns the activation of x, and its derivative in `slope`: who drops that pays nothing for it.
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

template <Activation kActivation>
FUSEFORMER_DEVICE float activate(float x) {
  float slope;
  return activate_with_slope<kActivation>(x, slope);
}

}  // namespace fuseformer
