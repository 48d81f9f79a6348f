// Arithmetic of activations that has an instruction of its own.
#pragma once

#include "warp.h"

namespace fuseformer {

#if defined(__CUDACC__)

// 1 / x to about one unit in the last place; results below 2^-126 are 0.
FUSEFORMER_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum, or NaN if either is: `maximum` returns the other one.
FUSEFORMER_DEVICE float maximum_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

FUSEFORMER_DEVICE float minimum(float a, float b) { return fminf(a, b); }
FUSEFORMER_DEVICE float absolute(float x) { return fabsf(x); }

#else

inline float reciprocal_approximate(float x) {
  const float y = 1.0f / x;
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}

inline float maximum_or_nan(float a, float b) { return a > b || a != a ? a : b; }

inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float absolute(float x) { return std::fabs(x); }

#endif

}  // namespace fuseformer
