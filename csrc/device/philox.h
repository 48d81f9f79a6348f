// Philox4x32-10, and which elements dropout keeps: the layout of `fuseformer.philox`, word for
// word.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include "warp.h"

namespace fuseformer {

struct PhiloxKey {
  uint32_t low;
  uint32_t high;
};

FUSEFORMER_DEVICE PhiloxKey seed_of(const int64_t* seed) {
  const uint64_t value = static_cast<uint64_t>(*seed);
  return {static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32)};
}

// Four words, the result of ten rounds on the counter (c0, c1, c2, c3).
FUSEFORMER_DEVICE void philox(uint32_t (&words)[4], PhiloxKey key, uint32_t c0, uint32_t c1,
                              uint32_t c2, uint32_t c3) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kIncrement0 = 0x9E3779B9, kIncrement1 = 0xBB67AE85;
  FUSEFORMER_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(c0, kMultiplier0), low0 = c0 * kMultiplier0;
    const uint32_t high1 = multiply_high(c2, kMultiplier1), low1 = c2 * kMultiplier1;
    c0 = high1 ^ c1 ^ key.low;
    c2 = high0 ^ c3 ^ key.high;
    c1 = low1;
    c3 = low0;
    key.low += kIncrement0;
    key.high += kIncrement1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// The words that decide rows {row, row + 8} and columns {column, + 8, + 16, + 24} of a head, for a
// row below 8 within its sixteen and a column below 8 within its thirty-two: word i is of column
// + 8 i, its low half of the first row.
FUSEFORMER_DEVICE void dropout_words(uint32_t (&words)[4], PhiloxKey key, int batch, int head,
                                     int row, int column) {
  philox(words, key, static_cast<uint32_t>(column / 32 * 8 + column % 8),
         static_cast<uint32_t>(row / 16 * 8 + row % 8), static_cast<uint32_t>(head),
         static_cast<uint32_t>(batch));
}

// Whether the element in the low (0) or high (1) half of a word is kept.
FUSEFORMER_DEVICE bool is_kept(uint32_t word, int half, uint32_t threshold) {
  return (half ? word >> 16 : word & 0xffff) >= threshold;
}

}  // namespace fuseformer
