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

// The random numbers of a fragment of hidden units. `row` and `unit` are the lane's first ones: a
// multiple of sixteen beyond those of its part in a fragment, and one of thirty-two, or of sixteen
// where the fragment has no more columns.
template <int kRowTiles, int kColumnTiles>
struct UnitDecisions {
  static constexpr int kAtOnce = kColumnTiles < 4 ? kColumnTiles : 4;  // of four that words decide
  static constexpr int kPatches = kColumnTiles / kAtOnce;
  static constexpr int kDraws = kRowTiles * kPatches * 2;
  static_assert(kPatches * kAtOnce == kColumnTiles && kAtOnce % 2 == 0);

  PhiloxKey seed;
  int row;
  int unit;
  uint32_t threshold;

  // Calls `function` with each place that a draw decides, and whether dropout keeps it.
  template <typename Function>
  FUSEFORMER_DEVICE void decide(int draw, const Function& function) const {
    const int tile = draw / (2 * kPatches), patch = draw / 2 % kPatches, j = draw % 2;
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

  // Sets the bit of each unit that a draw keeps: 4 * (kColumnTiles * tile + column tile) + j.
  FUSEFORMER_DEVICE void keep(int draw, uint32_t& bits) const {
    static_assert(kRowTiles * kColumnTiles <= 8);
    decide(draw, [&](int tile, int column, int j, bool keeps) {
      bits |= static_cast<uint32_t>(keeps) << (4 * (kColumnTiles * tile + column) + j);
    });
  }
};

// Sets hidden units that dropout does not keep to 0.
template <int kRowTiles, int kColumnTiles>
FUSEFORMER_DEVICE void drop_units(float (&hidden)[kRowTiles][kColumnTiles][4], PhiloxKey seed,
                                  int row, int unit, uint32_t threshold) {
  using Decisions = UnitDecisions<kRowTiles, kColumnTiles>;
  const Decisions decisions{seed, row, unit, threshold};
  FUSEFORMER_UNROLL
  for (int draw = 0; draw < Decisions::kDraws; ++draw) {
    decisions.decide(draw, [&](int tile, int column, int j, bool keeps) {
      if (!keeps) hidden[tile][column][j] = 0.0f;
    });
  }
}

}  // namespace fuseformer
