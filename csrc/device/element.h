// The floating types of the tensor cores, and their conversions.
#pragma once

#include "platform.h"

namespace fuseformer {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

#if defined(__CUDACC__)

// Rounds two numbers to nearest-even and packs them, `low` in the low half.
template <typename Element>
FUSEFORMER_DEVICE uint32_t pack(float low, float high);

template <>
FUSEFORMER_DEVICE uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
FUSEFORMER_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Rounds a number to the eleven bits of tf32, ties away from zero; the lowest thirteen are unused.
FUSEFORMER_DEVICE uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

FUSEFORMER_DEVICE float to_float(Bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

FUSEFORMER_DEVICE float to_float(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

#else

template <typename Element>
uint32_t pack(float low, float high);
uint32_t to_tf32(float x);
float to_float(Bfloat16 x);
float to_float(Half x);

#endif

// Returns the number in the low (0) or high (1) half of `packed`.
template <typename Element>
FUSEFORMER_DEVICE float unpack(uint32_t packed, int half) {
  return to_float(Element{static_cast<uint16_t>(half ? packed >> 16 : packed & 0xffff)});
}

}  // namespace fuseformer
