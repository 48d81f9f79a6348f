// Dropout of hidden units: the masks of attention for batch 0 and head 0.
#pragma once

#include "../device/philox.h"

namespace fuseformer {

// Sets hidden units that dropout does not keep to 0. `row` and `unit` are the lane's first ones, a
// multiple of sixteen and one of thirty-two beyond those of its part in a fragment.
template <int kRowTiles, int kColumnTiles>
FUSEFORMER_DEVICE void drop_units(float (&hidden)[kRowTiles][kColumnTiles][4], PhiloxKey seed,
                                  int row, int unit, uint32_t threshold) {
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int patch = 0; patch < kColumnTiles / 4; ++patch) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
        dropout_words(words, seed, 0, 0, row + 16 * tile, unit + 32 * patch + j);
        FUSEFORMER_UNROLL
        for (int i = 0; i < 4; ++i) {
          FUSEFORMER_UNROLL
          for (int half = 0; half < 2; ++half) {
            if (!is_kept(words[i], half, threshold))
              hidden[tile][4 * patch + i][2 * half + j] = 0.0f;
          }
        }
      }
    }
  }
}

}  // namespace fuseformer
