// The running softmax of the rows that a warp owns, in the units of exp2.
#pragma once

#include "../device/mma.h"
#include "../device/warp.h"

namespace fuseformer {

// A lane holds parts of two rows of each sixteen: `group` and `group + 8`.
template <int kRowTiles>
struct RunningSoftmax {
  float top[kRowTiles][2];  // largest product so far, before the scale
  float sum[kRowTiles][2];  // this lane's part of the sum of weights

  FUSEFORMER_DEVICE void clear() {
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      top[tile][0] = top[tile][1] = kMinusInfinity;
      sum[tile][0] = sum[tile][1] = 0.0f;
    }
  }

  // Turns products into weights, and scales `out` to the new maximum. A row that has seen nothing
  // yet, which only masks make possible, may have any finite shift: its weights are 0, not NaN.
  template <bool kMasked, int kKeyTiles, int kOutTiles>
  FUSEFORMER_DEVICE void take(float (&products)[kRowTiles][kKeyTiles][4],
                              float (&out)[kRowTiles][kOutTiles][4], float scale_log2) {
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        float new_top = top[tile][half];
        FUSEFORMER_UNROLL
        for (int i = 0; i < kKeyTiles; ++i) {
          new_top = maximum(new_top, products[tile][i][2 * half]);
          new_top = maximum(new_top, products[tile][i][2 * half + 1]);
        }
        new_top = row_maximum(new_top);
        const float shift = kMasked && new_top == kMinusInfinity ? 0.0f : new_top * scale_log2;
        const float rescale = exp2_approximate(top[tile][half] * scale_log2 - shift);
        top[tile][half] = new_top;
        float added = 0.0f;
        FUSEFORMER_UNROLL
        for (int i = 0; i < kKeyTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            products[tile][i][j] = exp2_approximate(products[tile][i][j] * scale_log2 - shift);
            added += products[tile][i][j];
          }
        }
        sum[tile][half] = sum[tile][half] * rescale + added;
        FUSEFORMER_UNROLL
        for (int i = 0; i < kOutTiles; ++i) {
          out[tile][i][2 * half] *= rescale;
          out[tile][i][2 * half + 1] *= rescale;
        }
      }
    }
  }
};

}  // namespace fuseformer
