// Feed-forward, backward, resident regime: all gradients in one pass, and nothing of the size of the
// hidden layer in memory.
//
// With h = x w1^T + b1, a = act(h) and da = dy w2, both where dropout keeps the unit and 0 elsewhere,
// and dh = da act'(h): dw2 = dy^T a, dw1 = dh^T x, db1 = colsum(dh), dx = dh w1, all of them times
// dropout's factor. A block owns hidden units and a range of tokens: its weight gradients stay in
// registers, and blocks of the same tokens add to dx one after the other, in the order of their
// units: the sum is the same in every run.
#pragma once

#include "../device/atomic.h"
#include "../device/tile.h"
#include "activation.h"
#include "backward_params.h"
#include "backward_traits.h"
#include "dropout.h"

namespace fuseformer {

// What one warp holds, and where its operands lie in shared memory.
template <typename Traits>
struct FeedForwardBackwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kRowTiles = Traits::kRowTiles, kUnitTiles = Traits::kUnitTiles;
  static constexpr int kWeightRowTiles = Traits::kWeightRowTiles;
  static constexpr int kWeightColumnTiles = Traits::kWeightColumnTiles;
  static constexpr int kDxRowTiles = Traits::kDxRowTiles;
  static constexpr int kDxPartTiles = Traits::kDxColumnTiles / Traits::kDxParts;
  using WidthAddresses = LaneAddresses<Traits::kWidth>;
  using UnitAddresses = LaneAddresses<Traits::kBlockH>;

  float dweight[kWeightRowTiles][kWeightColumnTiles][4];
  float dbias[kUnitTiles][2];
  WidthAddresses token_rows;     // operand A of the hidden tile: tokens, and dy
  WidthAddresses w1_columns;     // operand B of the hidden tile
  UnitAddresses w2_rows;         // operand B of its gradient
  UnitAddresses dhidden_rows;    // operand A of dx
  WidthAddresses w1_rows;        // operand B of dx
  UnitAddresses hidden_columns;  // operand A of the weight gradient: dh, or a
  WidthAddresses token_columns;  // operand B of it: tokens, or dy
  uint32_t stored;               // offset in shared memory of the lane's first hidden units

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
    stored = Traits::kHiddenOffset + Tile<Traits::kBlockH>::offset(row + lane / 4, unit / 8) +
             lane % 4 * 4;

    const int dx_row = index % Traits::kDxRowWarps * kDxRowTiles * 16;
    dhidden_rows = UnitAddresses::in_row_order(
        hidden + Traits::kHiddenBytes + dx_row * kUnitRow, lane);
    w1_rows =
        WidthAddresses::in_row_order(shared, lane, index / Traits::kDxRowWarps * Traits::kDxColumnTiles / 2);

    const bool of_dy = index / Traits::kWeightWarps;
    const int place = index % Traits::kWeightWarps;
    hidden_columns = UnitAddresses::in_column_order(
        hidden + (of_dy ? 0 : Traits::kHiddenBytes), lane,
        place % Traits::kWeightRowWarps * kWeightRowTiles);
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
    FUSEFORMER_UNROLL
    for (int i = 0; i < kUnitTiles; ++i) dbias[i][0] = dbias[i][1] = 0.0f;
  }

  FUSEFORMER_DEVICE void compute_addresses_again() {
    token_rows.compute_phases_again();
    w1_columns.compute_phases_again();
    w2_rows.compute_phases_again();
    dhidden_rows.compute_phases_again();
    w1_rows.compute_phases_again();
    hidden_columns.compute_phases_again();
    token_columns.compute_phases_again();
    compute_again(stored);
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
      between(step);
    }
  }

  // hidden += x @ w1.T
  FUSEFORMER_DEVICE void multiply_tokens(float (&hidden)[kRowTiles][kUnitTiles][4], int stage) {
    multiply<Traits::kWidth / 16>(
        hidden,
        [&](uint32_t(&a)[4], int tile, int step) {
          ldmatrix_x4(a, token_rows.at(tile, step) + stage);
        },
        [&](uint32_t(&b)[4], int pair, int step) { ldmatrix_x4(b, w1_columns.at(pair, step)); },
        [](int) {});
  }

  // dhidden += dy @ w2
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_dy(float (&dhidden)[kRowTiles][kUnitTiles][4], int stage,
                                     const Between& between) {
    multiply<Traits::kWidth / 16>(
        dhidden,
        [&](uint32_t(&a)[4], int tile, int step) {
          ldmatrix_x4(a, token_rows.at(tile, step) + (Traits::kDyOffset - Traits::kTokenOffset) +
                             stage);
        },
        [&](uint32_t(&b)[4], int pair, int step) {
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
        [&](uint32_t(&a)[4], int tile, int step) { ldmatrix_x4(a, dhidden_rows.at(tile, step)); },
        [&](uint32_t(&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, w1_rows.at(step, part * (kDxPartTiles / 2) + pair));
        },
        between);
  }

  // dweight += dh.T @ x, or a.T @ dy
  template <typename Between>
  FUSEFORMER_DEVICE void add_to_weights(int stage, const Between& between) {
    multiply<Traits::kBlockM / 16>(
        dweight,
        [&](uint32_t(&a)[4], int tile, int step) {
          ldmatrix_x4_transposed(a, hidden_columns.at(step, tile));
        },
        [&](uint32_t(&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, token_columns.at(step, pair) + stage);
        },
        between);
  }
};

// Grid: (unit blocks * splits of the tokens,), unit blocks fastest. Shared memory: see the traits.
template <typename Traits, typename Kind, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    feed_forward_backward_kernel(const FeedForwardGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = FeedForwardBackwardWarp<Traits>;
  constexpr int kBlockM = Traits::kBlockM, kBlockH = Traits::kBlockH, kWidth = Traits::kWidth;
  constexpr int kThreads = Traits::kThreads;

  const FeedForwardParams& params = given.forward;
  const int unit_blocks = (params.hidden + kBlockH - 1) / kBlockH;
  const int split = blockIdx.x / unit_blocks, turn = blockIdx.x % unit_blocks;
  const int block_unit = turn * kBlockH, units = params.hidden - block_unit;
  const int steps = (params.tokens + kBlockM - 1) / kBlockM;
  const int split_steps = (steps + given.splits - 1) / given.splits;
  const int first = split * split_steps, end = minimum(steps, first + split_steps);

  const int thread = threadIdx.x, lane = thread % 32, index = thread / 32;
  const int warp_unit = index % Traits::kUnitWarps * Warp::kUnitTiles * 8;
  const int lane_row = index / Traits::kUnitWarps * Warp::kRowTiles * 16 + lane / 4;
  const int lane_unit = warp_unit + lane % 4 * 2;
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress token_tile = shared + Traits::kTokenOffset;
  const SharedAddress dy_tile = shared + Traits::kDyOffset;
  float* const biases = reinterpret_cast<float*>(dynamic_shared() + Traits::kBiasOffset);
  Warp warp(shared, index, lane);

  const TileCopy<kWidth, kBlockM, kThreads> x_copy(thread, params.x.row_stride);
  const TileCopy<kWidth, kBlockM, kThreads> dy_copy(thread, given.dy.row_stride);
  const auto rows_of = [](const RowTensor& tensor, int step) {
    return static_cast<const char*>(tensor.data) + int64_t{2} * kBlockM * step * tensor.row_stride;
  };
  {
    const TileCopy<kWidth, kBlockH, kThreads> w1_copy(thread, kWidth);
    const TileCopy<kBlockH, kWidth, kThreads> w2_copy(thread, params.w2.row_stride);
    w1_copy.begin_bounded(
        shared, static_cast<const char*>(params.w1) + int64_t{2} * block_unit * kWidth, units);
    w2_copy.begin_narrow(shared + Traits::kWeightBytes,
                         static_cast<const char*>(params.w2.data) + 2 * block_unit, units);
    // Only the last step may reach past the last token: steps are taken from the end.
    if (first < end) {
      const int tokens = params.tokens - (end - 1) * kBlockM;
      x_copy.begin_bounded(token_tile, rows_of(params.x, end - 1), tokens);
      dy_copy.begin_bounded(dy_tile, rows_of(given.dy, end - 1), tokens);
    }
    copy_async_commit();
  }
  for (int unit = thread; unit < kBlockH; unit += kThreads) {
    const bool exists = params.b1 != nullptr && unit < units;
    biases[unit] =
        exists ? to_float(static_cast<const Element*>(params.b1)[block_unit + unit]) : 0.0f;
  }
  // Units that do not exist are never written, nor are they NaN where a token is infinite.
  for (int word = thread; word < 2 * Traits::kHiddenBytes / 16; word += kThreads) {
    const Sixteen zeros = {};
    copy_16(dynamic_shared() + Traits::kHiddenOffset + 16 * word, &zeros);
  }
  PhiloxKey seed{0, 0};
  if constexpr (kDropout) {
    seed = seed_of(params.seed);
  }

  int stage = 0;
  const auto begin_next = [&](int step, int to) {
    const bool more = step > first;
    x_copy.begin_if(token_tile + to, rows_of(params.x, step - 1) + x_copy.start, more);
    dy_copy.begin_if(dy_tile + to, rows_of(given.dy, step - 1) + dy_copy.start, more);
    copy_async_commit();
  };
  // Adds to dx of a step what a part has summed: of `count` shares, the one at `share`.
  using DxPart = float[Warp::kDxRowTiles][Warp::kDxPartTiles][4];
  const auto add_dx = [&](const DxPart& dx, int step, int part, int share, int count) {
    constexpr int kTiles = Warp::kDxRowTiles * Warp::kDxPartTiles;
    float* sums = given.dx_sums + int64_t{step} * (kBlockM * kWidth) + thread;
    FUSEFORMER_UNROLL
    for (int i = 0; i < kTiles / count; ++i) {
      const int tile = share * (kTiles / count) + i;
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) {
        atomic_add(sums + (4 * (part * kTiles + tile) + j) * kThreads,
                   dx[tile / Warp::kDxPartTiles][tile % Warp::kDxPartTiles][j]);
      }
    }
  };
  // Keeps the lane's units of a tile for other warps. Such as do not exist stay 0.
  const auto store = [&](const float (&values)[4], int tile, int i, int offset) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (warp_unit + 8 * i < units) {
        *reinterpret_cast<uint32_t*>(dynamic_shared() + (warp.stored ^ 16 * i) + offset +
                                     (16 * tile + 8 * half) * Tile<kBlockH>::kRowBytes) =
            pack<Element>(values[2 * half], values[2 * half + 1]);
      }
    }
  };
  for (int step = end - 1; step >= first; --step) {
    // Everyone has left the last step, and this step's copies are in.
    copy_async_wait<0>();
    block_barrier();
    if (thread == 0 && step + 1 < end) pass_turn(given.turns + step + 1);
    if constexpr (Traits::kStages == 2) begin_next(step, Traits::kTokenBytes - stage);
    warp.compute_addresses_again();

    uint32_t kept = 0;
    if constexpr (kDropout) {
      kept = kept_units<Warp::kRowTiles, Warp::kUnitTiles>(
          seed, step * kBlockM + lane_row, block_unit + lane_unit, params.dropout_threshold);
    }
    float hidden[Warp::kRowTiles][Warp::kUnitTiles][4];
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kUnitTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) hidden[tile][i][j] = biases[lane_unit + 8 * i + j % 2];
      }
    }
    warp.multiply_tokens(hidden, stage);
    float dhidden[Warp::kRowTiles][Warp::kUnitTiles][4] = {};
    constexpr int kTiles = Warp::kRowTiles * Warp::kUnitTiles;
    constexpr int kAtOnce = (kTiles + kWidth / 16 - 1) / (kWidth / 16);
    const auto keeps = [&](int tile, int i, int j) {
      return !kDropout || (kept >> ((tile * Warp::kUnitTiles + i) * 4 + j) & 1);
    };
    // Activations are computed while products run; their slopes take their place.
    warp.multiply_dy(dhidden, stage, [&](int width_step) {
      FUSEFORMER_UNROLL
      for (int place = width_step * kAtOnce; place < (width_step + 1) * kAtOnce; ++place) {
        if (place >= kTiles) break;
        const int tile = place / Warp::kUnitTiles, i = place % Warp::kUnitTiles;
        float values[4];
        with_kind<Kind>(given.activation, [&](auto kind) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) {
            float& slope = hidden[tile][i][j];
            values[j] = activate_with_slope<decltype(kind)::value>(slope, slope);
            if (!keeps(tile, i, j)) values[j] = slope = 0.0f;
          }
        });
        store(values, tile, i, 0);
      }
    });
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kUnitTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          dhidden[tile][i][j] *= hidden[tile][i][j];
          warp.dbias[i][j % 2] += dhidden[tile][i][j];
        }
        store(dhidden[tile][i], tile, i, Traits::kHiddenBytes);
      }
    }
    if (thread == 0) wait_for_turn(given.turns + step, turn);
    block_barrier();
    float dx[Traits::kDxParts][Warp::kDxRowTiles][Warp::kDxPartTiles][4] = {};
    const auto nothing = [](int) {};
    if constexpr (Traits::kStages == 2) {
      static_assert(Traits::kDxParts == 1);
      warp.multiply_dhidden(dx[0], 0, nothing);
      warp.add_to_weights(stage, [&](int k) { add_dx(dx[0], step, 0, k, kBlockM / 16); });
      stage = Traits::kTokenBytes - stage;
    } else {
      warp.add_to_weights(0, nothing);
      block_barrier();
      begin_next(step, 0);
      warp.multiply_dhidden(dx[0], 0, nothing);
      if constexpr (Traits::kDxParts == 2) {
        warp.multiply_dhidden(dx[1], 1, [&](int k) { add_dx(dx[0], step, 0, k, kBlockH / 16); });
      }
      add_dx(dx[Traits::kDxParts - 1], step, Traits::kDxParts - 1, 0, 1);
    }
    publish();
  }
  block_barrier();
  if (thread == 0 && first < end) pass_turn(given.turns + first);

  // Sums of the weights.
  const bool of_dy = index / Traits::kWeightWarps;
  const int place = index % Traits::kWeightWarps;
  const int row = place % Traits::kWeightRowWarps * Warp::kWeightRowTiles * 16 + lane / 4;
  const int column =
      place / Traits::kWeightRowWarps * Warp::kWeightColumnTiles * 8 + lane % 4 * 2;
  float* const sums = given.weight_sums +
                      (int64_t{2} * split + of_dy) * params.hidden * kWidth +
                      int64_t{block_unit} * kWidth + column;
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kWeightRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int unit = row + 16 * tile + 8 * half;
      if (unit >= units) continue;
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kWeightColumnTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 2; ++j) {
          sums[unit * kWidth + 8 * i + j] = warp.dweight[tile][i][2 * half + j];
        }
      }
    }
  }
  // Those of the bias: over the lanes that have the same units, then over the warps.
  float* const warp_sums = reinterpret_cast<float*>(dynamic_shared() + Traits::kHiddenOffset);
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kUnitTiles; ++i) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 2; ++j) {
      float sum = warp.dbias[i][j];
      FUSEFORMER_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane < 4) {
        warp_sums[index / Traits::kUnitWarps * kBlockH + lane_unit + 8 * i + j] = sum;
      }
    }
  }
  block_barrier();
  for (int unit = thread; unit < minimum(kBlockH, units); unit += kThreads) {
    float sum = 0.0f;
    for (int i = 0; i < Traits::kTokenWarps; ++i) sum += warp_sums[i * kBlockH + unit];
    given.bias_sums[int64_t{split} * params.hidden + block_unit + unit] = sum;
  }
}

}  // namespace fuseformer
