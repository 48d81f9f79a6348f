// What the lanes of a warp do together, and arithmetic that has an instruction of its own.
#pragma once

#include "platform.h"

namespace fuseformer {

#if defined(__CUDACC__)

// Returns the `x` of the lane whose number differs in the bits `mask`; all 32 lanes take part.
FUSEFORMER_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// 2 to the power of x to about two units in the last place; results below 2^-126 are 0.
FUSEFORMER_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FUSEFORMER_DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FUSEFORMER_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
FUSEFORMER_DEVICE int minimum(int a, int b) { return min(a, b); }
FUSEFORMER_DEVICE int maximum(int a, int b) { return max(a, b); }

// The high and low 32 bits of a * b.
FUSEFORMER_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

#else

float shuffle_xor(float x, int mask);
float exp2_approximate(float x);
float log2_approximate(float x);

inline float maximum(float a, float b) { return a > b || b != b ? a : b; }
inline int minimum(int a, int b) { return a < b ? a : b; }
inline int maximum(int a, int b) { return a > b ? a : b; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

#endif

// The number of the thread, computed again: what follows from it is not kept in registers that are
// needed.
template <int kThreads>
FUSEFORMER_DEVICE int thread_again() {
  uint32_t thread = threadIdx.x;
  compute_again(thread);
  return static_cast<int>(thread % kThreads);
}

constexpr float kMinusInfinity = -__builtin_huge_valf();

// The maximum, or the sum, over the four lanes that hold one row of an accumulator.
FUSEFORMER_DEVICE float row_maximum(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

FUSEFORMER_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace fuseformer
