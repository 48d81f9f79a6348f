// dropout(activation(x @ w.T + bias)), or dropout(activation(x @ w.T) * (x @ w_up.T)): products
// whose epilogue saves a pass over the result.
#pragma once

#include "../device/tile.h"
#include "activation.h"
#include "dropout.h"
#include "linear_params.h"
#include "linear_traits.h"

namespace fuseformer {

// Grid: (row blocks * unit blocks,), groups of kGroup row blocks side by side, so that the weights
// of a unit block are read by neighbours. Shared memory: two tiles of tokens and two of weights, in
// which the strips of two matrices take turns; at the end, where those were, the tile of the
// output.
template <typename Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads) linear_kernel(const LinearParams params) {
  using Element = typename Traits::Element;
  using Addresses = LaneAddresses<Traits::kBlockK>;
  using OutLayout = Tile<Traits::kUnits>;
  constexpr int kBlockM = Traits::kBlockM, kUnits = Traits::kUnits;
  constexpr int kRowTiles = Traits::kRowTiles, kColumnTiles = Traits::kColumnTiles;
  constexpr int kUnitTiles = Traits::kUnitTiles, kStripRows = Traits::kStripRows;
  constexpr bool kGated = Traits::kMatrices == 2;

  const int row_blocks = (params.tokens + kBlockM - 1) / kBlockM;
  const int unit_blocks = (params.hidden + kUnits - 1) / kUnits;
  const int group = blockIdx.x / (Traits::kGroup * unit_blocks);
  const int group_rows = minimum(Traits::kGroup, row_blocks - group * Traits::kGroup);
  const int in_group = blockIdx.x % (Traits::kGroup * unit_blocks);
  const int block_row = (group * Traits::kGroup + in_group % group_rows) * kBlockM;
  const int block_unit = in_group / group_rows * kUnits;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % Traits::kWarpRows * 16 * kRowTiles;
  const int warp_column = warp / Traits::kWarpRows;
  const int warp_unit = warp_column * 8 * kUnitTiles;
  const SharedAddress x_tile = shared_address(dynamic_shared());
  const SharedAddress w_tile = x_tile + kBlockM * Traits::kRowBytes;
  const Addresses x_addresses =
      Addresses::in_row_order(x_tile + warp_row * Traits::kRowBytes, lane);
  const Addresses w_addresses =
      Addresses::in_column_order(w_tile + warp_column * 8 * kColumnTiles * Traits::kRowBytes, lane);

  float sums[kRowTiles][kColumnTiles][4] = {};
  const int steps = (params.width + Traits::kBlockK - 1) / Traits::kBlockK;
  const TileCopy<Traits::kBlockK, kBlockM, Traits::kThreads> x_copy(thread, params.x.row_stride);
  const TileCopy<Traits::kBlockK, kStripRows, Traits::kThreads> w_copy(thread, params.w.row_stride);
  const char* x_rows =
      static_cast<const char*>(params.x.data) + int64_t{2} * block_row * params.x.row_stride;
  const int64_t w_start = int64_t{2} * block_unit * params.w.row_stride;
  const char* w_rows = static_cast<const char*>(params.w.data) + w_start;
  const char* up_rows = static_cast<const char*>(params.w_up.data) + w_start;
  const auto begin_copies = [&](auto edge, int step, int stage) {
    const int column = step * Traits::kBlockK;
    if constexpr (decltype(edge)::value) {
      x_copy.begin_corner(x_tile + stage, x_rows + 2 * column, params.tokens - block_row,
                          params.width - column);
    } else {
      x_copy.begin(x_tile + stage, x_rows + 2 * column);
    }
    FUSEFORMER_UNROLL
    for (int strip = 0; strip < Traits::kStrips; ++strip) {
      const int unit = strip / Traits::kMatrices * kStripRows;
      const SharedAddress target = w_tile + stage + strip * kStripRows * Traits::kRowBytes;
      const char* source = (kGated && strip % 2 == 1 ? up_rows : w_rows) + 2 * column +
                           int64_t{2} * unit * params.w.row_stride;
      if constexpr (decltype(edge)::value) {
        w_copy.begin_corner(target, source, params.hidden - block_unit - unit,
                            params.width - column);
      } else {
        w_copy.begin(target, source);
      }
    }
    copy_async_commit();
  };
  const auto multiply = [&](auto edge) {
    if (steps > 0) begin_copies(edge, 0, 0);
    int stage = 0;
    for (int step = 0; step < steps; ++step, stage = Traits::kStageBytes - stage) {
      // Everyone has left the last step, and this step's copies are in.
      copy_async_wait<0>();
      block_barrier();
      if (step + 1 < steps) {
        begin_copies(edge, step + 1, Traits::kStageBytes - stage);
      }
      FUSEFORMER_UNROLL
      for (int k = 0; k < Traits::kBlockK / 16; ++k) {
        uint32_t a[kRowTiles][4];
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          ldmatrix_x4(a[tile], x_addresses.at(tile, k) + stage);
        }
        FUSEFORMER_UNROLL
        for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
          uint32_t b[4];
          ldmatrix_x4(b, w_addresses.at(pair, k) + stage);
          FUSEFORMER_UNROLL
          for (int tile = 0; tile < kRowTiles; ++tile) {
            mma_16x8x16<Element>(sums[tile][2 * pair], a[tile], b[0], b[1]);
            mma_16x8x16<Element>(sums[tile][2 * pair + 1], a[tile], b[2], b[3]);
          }
        }
      }
    }
  };
  const bool whole = block_row + kBlockM <= params.tokens && block_unit + kUnits <= params.hidden &&
                     params.width % Traits::kBlockK == 0;
  if (whole) {
    multiply(Constant<false>());
  } else {
    multiply(Constant<true>());
  }

  const int lane_row = block_row + warp_row + lane / 4;
  const int lane_unit = block_unit + warp_unit + lane % 4 * 2;
  if (!kGated && params.bias != nullptr) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < kUnitTiles; ++i) {
      if (lane_unit + 8 * i >= params.hidden) continue;
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(
          static_cast<const Element*>(params.bias) + lane_unit + 8 * i);
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) sums[tile][i][j] += unpack<Element>(pair, j % 2);
      }
    }
  }
  // Writes a tile, the values from `first` on, by whole rows: through shared memory, which nobody
  // reads any more.
  const auto write = [&](const RowTensor& target, const auto& values, int first) {
    block_barrier();
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        FUSEFORMER_UNROLL
        for (int i = 0; i < kUnitTiles; ++i) {
          const int offset =
              OutLayout::offset(lane_row - block_row + 16 * tile + 8 * half, warp_unit / 8 + i) +
              lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = pack<Element>(
              values[tile][first + i][2 * half], values[tile][first + i][2 * half + 1]);
        }
      }
    }
    block_barrier();
    for (int index = thread; index < kBlockM * OutLayout::kChunks; index += Traits::kThreads) {
      const int row = index / OutLayout::kChunks, chunk = index % OutLayout::kChunks;
      if (block_row + row < params.tokens && block_unit + 8 * chunk < params.hidden) {
        copy_16(static_cast<Element*>(target.data) + (block_row + row) * target.row_stride +
                    block_unit + 8 * chunk,
                dynamic_shared() + OutLayout::offset(row, chunk));
      }
    }
  };
  if (params.pre.data != nullptr) {
    write(params.pre, sums, 0);
    if constexpr (kGated) write(params.up, sums, kUnitTiles);
  }
  float hidden[kRowTiles][kUnitTiles][4];
  with_activation(params.activation, [&](auto kind) {
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int i = 0; i < kUnitTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          hidden[tile][i][j] = activate<decltype(kind)::value>(sums[tile][i][j]);
          if constexpr (kGated) hidden[tile][i][j] *= sums[tile][kUnitTiles + i][j];
          if constexpr (kDropout) hidden[tile][i][j] *= params.dropout_scale;
        }
      }
    }
  });
  if constexpr (kDropout) {
    drop_units(hidden, seed_of(params.seed), lane_row, lane_unit, params.dropout_threshold);
  }
  write(params.act, hidden, 0);
}

}  // namespace fuseformer
