// Dropout of hidden units: the masks of attention for batch 0 and head 0.
#pragma once

#include "../device/philox.h"

namespace fuseformer {

// Whether dropout keeps one hidden unit of a token. Neighbours of its patch have words of their
// own: where many units are decided, `drop_units` is for less.
FUSEFORMER_DEVICE bool keeps_unit(PhiloxKey seed, int row, int unit, uint32_t threshold) {
  uint32_t words[4];
  dropout_words(words, seed, 0, 0, row / 16 * 16 + row % 8, unit / 32 * 32 + unit % 8);
  // An index that is not known while it is compiled would put the words into memory.
  const uint32_t even = unit & 16 ? words[2] : words[0], odd = unit & 16 ? words[3] : words[1];
  return is_kept(unit & 8 ? odd : even, row / 8 % 2, threshold);
}

// Calls `function` with each place of a fragment and whether dropout keeps it. `row` and `unit` are
// the lane's first ones: a multiple of sixteen beyond those of its part in a fragment, and one of
// thirty-two, or of sixteen where the fragment has no more columns.
template <int kRowTiles, int kColumnTiles, typename Function>
FUSEFORMER_DEVICE void decide_units(PhiloxKey seed, int row, int unit, uint32_t threshold,
                                    const Function& function) {
  constexpr int kAtOnce = kColumnTiles < 4 ? kColumnTiles : 4;  // of four that the words decide
  static_assert(kColumnTiles % kAtOnce == 0 && kAtOnce % 2 == 0);
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int patch = 0; patch < kColumnTiles / kAtOnce; ++patch) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
        dropout_words(words, seed, 0, 0, row + 16 * tile, unit + 32 * patch + j);
        FUSEFORMER_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const bool upper = kAtOnce == 2 && unit / 16 % 2;
          const uint32_t word = upper ? words[i + 4 - kAtOnce] : words[i];
          FUSEFORMER_UNROLL
          for (int half = 0; half < 2; ++half) {
            function(tile, kAtOnce * patch + i, 2 * half + j, is_kept(word, half, threshold));
          }
        }
      }
    }
  }
}

// Sets hidden units that dropout does not keep to 0.
template <int kRowTiles, int kColumnTiles>
FUSEFORMER_DEVICE void drop_units(float (&hidden)[kRowTiles][kColumnTiles][4], PhiloxKey seed,
                                  int row, int unit, uint32_t threshold) {
  decide_units<kRowTiles, kColumnTiles>(seed, row, unit, threshold,
                                        [&](int tile, int column, int j, bool keeps) {
                                          if (!keeps) hidden[tile][column][j] = 0.0f;
                                        });
}

// Which hidden units dropout keeps, a bit each: 4 * (kColumnTiles * tile + column tile) + j.
template <int kRowTiles, int kColumnTiles>
FUSEFORMER_DEVICE uint32_t kept_units(PhiloxKey seed, int row, int unit, uint32_t threshold) {
  static_assert(kRowTiles * kColumnTiles <= 8);
  uint32_t kept = 0;
  decide_units<kRowTiles, kColumnTiles>(
      seed, row, unit, threshold, [&](int tile, int column, int j, bool keeps) {
        kept |= static_cast<uint32_t>(keeps) << (4 * (kColumnTiles * tile + column) + j);
      });
  return kept;
}

}  // namespace fuseformer
