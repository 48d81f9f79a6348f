// What a warp of the feed-forward backward kernel holds, and the products that it computes.
#pragma once

#include "../device/tile.h"
#include "backward_params.h"
#include "backward_traits.h"

namespace fuseformer {

// What one warp holds, and where its operands lie in shared memory.
template <typename Traits>
struct FeedForwardBackwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kRowTiles = Traits::kRowTiles, kUnitTiles = Traits::kUnitTiles;
  static constexpr int kWeightRowTiles = Traits::kWeightRowTiles;
  static constexpr int kWeightColumnTiles = Traits::kWeightColumnTiles;
  static constexpr int kDxRowTiles = Traits::kDxRowTiles;
  static constexpr int kDxPartTiles = Traits::kDxPartTiles;
  static constexpr int kDyPartTiles = Traits::kDyPartTiles;
  static constexpr int kBiasTiles = Traits::kBiasTiles;
  using WidthAddresses = LaneAddresses<Traits::kWidth>;
  using UnitAddresses = LaneAddresses<Traits::kBlockH>;

  float dweight[kWeightRowTiles][kWeightColumnTiles][4];
  WidthAddresses token_rows;     // operand A of the hidden tile: tokens, and dy
  WidthAddresses w1_columns;     // operand B of the hidden tile
  UnitAddresses w2_rows;         // operand B of its gradient
  UnitAddresses dhidden_rows;    // operand A of dx
  WidthAddresses w1_rows;        // operand B of dx
  UnitAddresses hidden_columns;  // operand A of the weight gradient: dh, or a
  WidthAddresses token_columns;  // operand B of it: tokens, or dy

  FUSEFORMER_DEVICE FeedForwardBackwardWarp(SharedAddress shared, int index, int lane) {
    const int token_warp = index / Traits::kUnitWarps, unit_warp = index % Traits::kUnitWarps;
    const SharedAddress tokens = shared + Traits::kTokenOffset;
    const SharedAddress hidden = shared + Traits::kHiddenOffset;
    constexpr int kWidthRow = Tile<Traits::kWidth>::kRowBytes;
    constexpr int kUnitRow = Tile<Traits::kBlockH>::kRowBytes;
    const int row = token_warp * kRowTiles * 16, unit = unit_warp * kUnitTiles * 8;
    token_rows = WidthAddresses::in_row_order(tokens + row * kWidthRow, lane);
    w1_columns = WidthAddresses::in_column_order(shared + unit * kWidthRow, lane);
    w2_rows = UnitAddresses::in_row_order(shared + Traits::kWeightBytes, lane, unit / 16);

    const int dx_row = index % Traits::kDxRowWarps * kDxRowTiles * 16;
    dhidden_rows =
        UnitAddresses::in_row_order(hidden + Traits::kHiddenBytes + dx_row * kUnitRow, lane);
    w1_rows = WidthAddresses::in_row_order(
        shared, lane, index / Traits::kDxRowWarps * Traits::kDxColumnTiles / 2);

    const bool of_dy = index / Traits::kWeightWarps;
    const int place = index % Traits::kWeightWarps;
    hidden_columns = UnitAddresses::in_column_order(
        hidden + (of_dy ? 0 : Traits::kHiddenBytes), lane,
        place % Traits::kWeightRowWarps * kWeightRowTiles + first_tile(place));
    token_columns = WidthAddresses::in_row_order(
        tokens + (of_dy ? Traits::kDyOffset - Traits::kTokenOffset : 0), lane,
        place / Traits::kWeightRowWarps * kWeightColumnTiles / 2);
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kWeightRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int i = 0; i < kWeightColumnTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) dweight[tile][i][j] = 0.0f;
      }
    }
  }

  // Warps that have the same units share the sums of the bias: each begins with another tile, and
  // has them in the order of tile ^ first_tile, as `compute_phases_again` makes it.
  static FUSEFORMER_DEVICE int first_tile(int place) {
    return place / Traits::kWeightRowWarps * kBiasTiles;
  }

  FUSEFORMER_DEVICE void compute_addresses_again() {
    token_rows.compute_phases_again();
    w1_columns.compute_phases_again();
    w2_rows.compute_phases_again();
    dhidden_rows.compute_phases_again();
    w1_rows.compute_phases_again();
    hidden_columns.compute_phases_again();
    token_columns.compute_phases_again();
  }

  // What follows from the number of the thread, and is computed where it is used: the sums leave no
  // registers to keep it in.
  struct Place {
    int lane;
    int index;

    FUSEFORMER_DEVICE Place() {
      const int thread = thread_again<Traits::kThreads>();
      lane = thread % 32;
      index = thread / 32;
    }

    // The lane's first token of a step, and first hidden unit of the block.
    FUSEFORMER_DEVICE int row() const {
      return index / Traits::kUnitWarps * kRowTiles * 16 + lane / 4;
    }
    FUSEFORMER_DEVICE int unit() const {
      return index % Traits::kUnitWarps * kUnitTiles * 8 + lane % 4 * 2;
    }
    // Where these lie in shared memory.
    FUSEFORMER_DEVICE int stored() const {
      return Traits::kHiddenOffset + Tile<Traits::kBlockH>::offset(row(), unit() / 8) +
             lane % 4 * 4;
    }
  };

  // The sum over tokens of unit lane / 4, or the one that is eight further, of a tile.
  static FUSEFORMER_DEVICE float* bias_sum(int tile, int half) {
    const Place place;
    return reinterpret_cast<float*>(dynamic_shared() + Traits::kBiasSumOffset) +
           place.index * kBiasTiles * 16 + place.lane / 4 + 16 * tile + 8 * half;
  }

  // sums += a @ b, a and b being what the functions load for a tile of rows, or a pair of tiles of
  // columns, and sixteen of the common dimension. `between` is called behind each of those.
  template <int kSteps, int kRows, int kColumns, typename LoadA, typename LoadB, typename Between>
  static FUSEFORMER_DEVICE void multiply(float (&sums)[kRows][kColumns][4], const LoadA& load_a,
                                         const LoadB& load_b, const Between& between) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRows][4];
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kRows; ++tile) load_a(a[tile], tile, step);
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kColumns / 2; ++pair) {
        uint32_t b[4];
        load_b(b, pair, step);
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRows; ++tile) {
          mma_16x8x16<Element>(sums[tile][2 * pair], a[tile], b[0], b[1]);
          mma_16x8x16<Element>(sums[tile][2 * pair + 1], a[tile], b[2], b[3]);
        }
      }
      between(step, a);
    }
  }

  // Calls `function` with each number below `count` that falls to a step of a product with the
  // width.
  template <typename Function>
  static FUSEFORMER_DEVICE void share(int count, int step, const Function& function) {
    constexpr int kSteps = Traits::kWidth / 16;
    const int at_once = (count + kSteps - 1) / kSteps;
    FUSEFORMER_UNROLL
    for (int i = 0; i < at_once; ++i) {
      if (step * at_once + i < count) function(step * at_once + i);
    }
  }

  // hidden += x @ w1.T
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_tokens(float (&hidden)[kRowTiles][kUnitTiles][4], int stage,
                                         const Between& between) {
    multiply<Traits::kWidth / 16>(
        hidden,
        [&](uint32_t (&a)[4], int tile, int step) {
          ldmatrix_x4(a, token_rows.at(tile, step) + stage);
        },
        [&](uint32_t (&b)[4], int pair, int step) { ldmatrix_x4(b, w1_columns.at(pair, step)); },
        between);
  }

  // dhidden += dy @ w2, for a part of the warp's tokens.
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_dy(float (&dhidden)[kDyPartTiles][kUnitTiles][4], int part,
                                     int stage, const Between& between) {
    multiply<Traits::kWidth / 16>(
        dhidden,
        [&](uint32_t (&a)[4], int tile, int step) {
          constexpr int kOffset = Traits::kDyOffset - Traits::kTokenOffset;
          ldmatrix_x4(a, token_rows.at(part * kDyPartTiles + tile, step) + kOffset + stage);
        },
        [&](uint32_t (&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, w2_rows.at(step, pair));
        },
        between);
  }

  // dx += dh @ w1, for a part of the warp's columns.
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_dhidden(float (&dx)[kDxRowTiles][kDxPartTiles][4], int part,
                                          const Between& between) {
    multiply<Traits::kBlockH / 16>(
        dx,
        [&](uint32_t (&a)[4], int tile, int step) { ldmatrix_x4(a, dhidden_rows.at(tile, step)); },
        [&](uint32_t (&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, w1_rows.at(step, part * (kDxPartTiles / 2) + pair));
        },
        between);
  }

  // dweight += dh.T @ x, or a.T @ dy
  FUSEFORMER_DEVICE void add_to_weights(int stage) {
    // Products with ones sum over the tokens of a step. All columns are the same: the lane of the
    // first ones adds two numbers to the sums in shared memory.
    float dbias[kBiasTiles][4] = {};
    multiply<Traits::kBlockM / 16>(
        dweight,
        [&](uint32_t (&a)[4], int tile, int step) {
          ldmatrix_x4_transposed(a, hidden_columns.at(step, tile));
        },
        [&](uint32_t (&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, token_columns.at(step, pair) + stage);
        },
        [&](int, const uint32_t (&a)[kWeightRowTiles][4]) {
          const uint32_t ones = pack<Element>(1.0f, 1.0f);
          FUSEFORMER_UNROLL
          for (int tile = 0; tile < kBiasTiles; ++tile) {
            mma_16x8x16<Element>(dbias[tile], a[tile], ones, ones);
          }
        });
    if (threadIdx.x % 4 == 0) {
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kBiasTiles; ++tile) {
        *bias_sum(tile, 0) += dbias[tile][0];
        *bias_sum(tile, 1) += dbias[tile][2];
      }
    }
  }
};

// What a block of the grid takes: hidden units, and one of the splits of the tokens.
struct UnitBlock {
  int first_unit;
  int split;
};

template <typename Traits>
FUSEFORMER_DEVICE UnitBlock unit_block(const FeedForwardGradientParams& given, int index) {
  const int blocks = (given.forward.hidden + Traits::kBlockH - 1) / Traits::kBlockH;
  return {index % blocks * Traits::kBlockH, index / blocks};
}

// Writes the sums of a block over its tokens.
template <typename Traits>
FUSEFORMER_DEVICE void write_sums(const FeedForwardGradientParams& given,
                                  const FeedForwardBackwardWarp<Traits>& warp) {
  using Warp = FeedForwardBackwardWarp<Traits>;
  constexpr int kWidth = Traits::kWidth;
  // Computed again: the loop has no registers for it.
  uint32_t block = blockIdx.x;
  compute_again(block);
  const auto [block_unit, split] = unit_block<Traits>(given, static_cast<int>(block));
  const auto [lane, index] = typename Warp::Place();
  const int units = given.forward.hidden - block_unit;
  const bool of_dy = index / Traits::kWeightWarps;
  const int place = index % Traits::kWeightWarps;
  const int row = place % Traits::kWeightRowWarps * Warp::kWeightRowTiles * 16 + lane / 4;
  const int column = place / Traits::kWeightRowWarps * Warp::kWeightColumnTiles * 8 + lane % 4 * 2;
  float* const sums = given.weight_sums +
                      (int64_t{2} * split + of_dy) * given.forward.hidden * kWidth +
                      int64_t{block_unit} * kWidth + column;
  float* const bias_sums = given.bias_sums + int64_t{split} * given.forward.hidden + block_unit;
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kWeightRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int unit = row + 16 * (tile ^ Warp::first_tile(place)) + 8 * half;
      if (unit >= units) continue;
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kWeightColumnTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 2; ++j) {
          sums[unit * kWidth + 8 * i + j] = warp.dweight[tile][i][2 * half + j];
        }
      }
      if (tile < Warp::kBiasTiles && !of_dy && lane % 4 == 0) {
        bias_sums[unit] = *Warp::bias_sum(tile, half);
      }
    }
  }
}

}  // namespace fuseformer
