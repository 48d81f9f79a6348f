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
  uint32_t stored;               // offset in shared memory of the lane's first hidden units
  uint32_t bias_sums;            // the same of the sums of the bias

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
        place % Traits::kWeightRowWarps * kWeightRowTiles + first_tile(place));
    token_columns = WidthAddresses::in_row_order(
        tokens + (of_dy ? Traits::kDyOffset - Traits::kTokenOffset : 0), lane,
        place / Traits::kWeightRowWarps * kWeightColumnTiles / 2);
    bias_sums = Traits::kBiasSumOffset + 4 * (index * kBiasTiles * 16 + lane / 4);
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
    compute_again(stored);
    compute_again(bias_sums);
  }

  // The sum over tokens of unit lane / 4, or the one that is eight further, of a tile.
  FUSEFORMER_DEVICE float* bias_sum(int tile, int half) const {
    return reinterpret_cast<float*>(dynamic_shared() + bias_sums) + 16 * tile + 8 * half;
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

  // Calls `function` with each tile that falls to a step, of `count` tiles, of a product with the
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
  FUSEFORMER_DEVICE void multiply_tokens(float (&hidden)[kRowTiles][kUnitTiles][4], int stage) {
    multiply<Traits::kWidth / 16>(
        hidden,
        [&](uint32_t(&a)[4], int tile, int step) {
          ldmatrix_x4(a, token_rows.at(tile, step) + stage);
        },
        [&](uint32_t(&b)[4], int pair, int step) { ldmatrix_x4(b, w1_columns.at(pair, step)); },
        [](int, const auto&) {});
  }

  // dhidden += dy @ w2, for sixteen of the warp's tokens.
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_dy(float (&dhidden)[1][kUnitTiles][4], int tile, int stage,
                                     const Between& between) {
    multiply<Traits::kWidth / 16>(
        dhidden,
        [&](uint32_t(&a)[4], int, int step) {
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
    // Products with ones sum over the tokens of a step. All columns are the same, hence two numbers
    // of a lane, which are kept in shared memory.
    float dbias[kBiasTiles][4];
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < kBiasTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) dbias[tile][j] = *bias_sum(tile, j / 2);
    }
    multiply<Traits::kBlockM / 16>(
        dweight,
        [&](uint32_t(&a)[4], int tile, int step) {
          ldmatrix_x4_transposed(a, hidden_columns.at(step, tile));
        },
        [&](uint32_t(&b)[4], int pair, int step) {
          ldmatrix_x4_transposed(b, token_columns.at(step, pair) + stage);
        },
        [&](int step, const uint32_t(&a)[kWeightRowTiles][4]) {
          const uint32_t ones = pack<Element>(1.0f, 1.0f);
          FUSEFORMER_UNROLL
          for (int tile = 0; tile < kBiasTiles; ++tile) {
            mma_16x8x16<Element>(dbias[tile], a[tile], ones, ones);
          }
          between(step);
        });
    if (threadIdx.x % 4 == 0) {
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kBiasTiles; ++tile) {
        *bias_sum(tile, 0) = dbias[tile][0];
        *bias_sum(tile, 1) = dbias[tile][2];
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
  uint32_t thread = threadIdx.x, block = blockIdx.x;
  compute_again(thread);
  compute_again(block);
  const auto [block_unit, split] = unit_block<Traits>(given, static_cast<int>(block));
  const int lane = thread % 32, index = thread / 32, units = given.forward.hidden - block_unit;
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
        bias_sums[unit] = *warp.bias_sum(tile, half);
      }
    }
  }
}

// Grid: (unit blocks * splits of the tokens,), unit blocks fastest. Shared memory: see the traits.
template <typename Traits, typename Kind, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    feed_forward_backward_kernel(const FeedForwardGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = FeedForwardBackwardWarp<Traits>;
  constexpr int kBlockM = Traits::kBlockM, kBlockH = Traits::kBlockH, kWidth = Traits::kWidth;
  constexpr int kThreads = Traits::kThreads;

  const FeedForwardParams& params = given.forward;
  const auto [block_unit, split] = unit_block<Traits>(given, blockIdx.x);
  const int units = params.hidden - block_unit;
  const int steps = (params.tokens + kBlockM - 1) / kBlockM;
  const int split_steps = (steps + given.splits - 1) / given.splits;
  const int first = split * split_steps, end = minimum(steps, first + split_steps);

  const int thread = threadIdx.x, lane = thread % 32, index = thread / 32;
  const int warp_unit = index % Traits::kUnitWarps * Warp::kUnitTiles * 8;
  const int lane_unit = warp_unit + lane % 4 * 2;
  const int warp_units = units - warp_unit;  // that exist
  const auto warp_first_unit = [&] { return params.hidden - warp_units; };
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress token_tile = shared + Traits::kTokenOffset;
  const SharedAddress dy_tile = shared + Traits::kDyOffset;
  float* const biases = reinterpret_cast<float*>(dynamic_shared() + Traits::kBiasOffset);
  Warp warp(shared, index, lane);

  using TokenCopy = TileCopy<kWidth, kBlockM, kThreads>;
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
      TokenCopy(thread, params.x.row_stride)
          .begin_bounded(token_tile, rows_of(params.x, end - 1), tokens);
      TokenCopy(thread, given.dy.row_stride)
          .begin_bounded(dy_tile, rows_of(given.dy, end - 1), tokens);
    }
    copy_async_commit();
  }
  for (int unit = thread; unit < kBlockH; unit += kThreads) {
    const bool exists = params.b1 != nullptr && unit < units;
    biases[unit] =
        exists ? to_float(static_cast<const Element*>(params.b1)[block_unit + unit]) : 0.0f;
  }
  for (int i = thread; i < Traits::kBiasSums; i += kThreads) biases[kBlockH + i] = 0.0f;
  // Units that do not exist are never written, nor are they NaN where a token is infinite.
  for (int word = thread; word < 2 * Traits::kHiddenBytes / 16; word += kThreads) {
    const Sixteen zeros = {};
    copy_16(dynamic_shared() + Traits::kHiddenOffset + 16 * word, &zeros);
  }

  int stage = 0;
  const auto begin_next = [&](int step, int to) {
    const bool more = step > first;
    // What the copies of a thread are is computed in each step: there are no registers to keep it.
    uint32_t again = threadIdx.x;
    compute_again(again);
    const TokenCopy x_copy(again, params.x.row_stride), dy_copy(again, given.dy.row_stride);
    x_copy.begin_if(token_tile + to, rows_of(params.x, step - 1) + x_copy.start, more);
    dy_copy.begin_if(dy_tile + to, rows_of(given.dy, step - 1) + dy_copy.start, more);
    copy_async_commit();
  };
  // Adds to dx of a step what a part has summed: of `count` shares, the one at `share`.
  using DxPart = float[Warp::kDxRowTiles][Warp::kDxPartTiles][4];
  const auto add_dx = [&](const DxPart& dx, int step, int part, int share, int count) {
    constexpr int kTiles = Warp::kDxRowTiles * Warp::kDxPartTiles;
    float* const sums = given.dx_sums + int64_t{step} * (kBlockM * kWidth) + thread;
    FUSEFORMER_UNROLL
    for (int i = 0; i < kTiles / count; ++i) {
      const int tile = (share * (kTiles / count) + i) / Warp::kDxPartTiles;
      const int column = (share * (kTiles / count) + i) % Warp::kDxPartTiles;
      const int place = 4 * Traits::dx_place(tile, part * Warp::kDxPartTiles + column);
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) atomic_add(sums + (place + j) * kThreads, dx[tile][column][j]);
    }
  };
  // Keeps the lane's units of a tile for other warps. Such as do not exist stay 0.
  const auto store = [&](const float (&values)[4], int tile, int i, int offset) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (8 * i < warp_units) {
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
      // Neither the seed nor the lane's place is kept from step to step.
      uint32_t again = threadIdx.x;
      compute_again(again);
      const int row = again / 32 / Traits::kUnitWarps * Warp::kRowTiles * 16 + again % 32 / 4;
      kept = kept_units<Warp::kRowTiles, Warp::kUnitTiles>(
          seed_of(params.seed), step * kBlockM + row, warp_first_unit() + again % 4 * 2,
          params.dropout_threshold);
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
    const auto activate_tile = [&](auto kind, int place) {
      const int tile = place / Warp::kUnitTiles, i = place % Warp::kUnitTiles;
      float values[4];
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& slope = hidden[tile][i][j];  // in the place of what it is the slope at
        values[j] = activate_with_slope<decltype(kind)::value>(slope, slope);
        if (kDropout && !(kept >> (4 * place + j) & 1)) values[j] = slope = 0.0f;
      }
      store(values, tile, i, 0);
    };
    // One activation is computed while products run, a choice of them before: it is made once.
    constexpr int kTiles = Warp::kRowTiles * Warp::kUnitTiles;
    constexpr bool kChooses = std::is_same_v<Kind, SmoothActivation>;
    if constexpr (kChooses) {
      with_activation_of<Kind>(given.activation, [&](auto kind) {
        FUSEFORMER_UNROLL
        for (int place = 0; place < kTiles; ++place) activate_tile(kind, place);
      });
    }
    float dhidden[Warp::kRowTiles][1][Warp::kUnitTiles][4] = {};
    const auto finish_tile = [&](int tile, int i) {
      float(&gradient)[4] = dhidden[tile][0][i];
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) gradient[j] *= hidden[tile][i][j];
      store(gradient, tile, i, Traits::kHiddenBytes);
    };
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
      warp.multiply_dy(dhidden[tile], tile, stage, [&](int width_step, const auto&) {
        if constexpr (!kChooses) {
          if (tile == 0) {
            warp.share(kTiles, width_step, [&](int place) { activate_tile(Kind(), place); });
          }
        }
        if (tile > 0) {
          warp.share(Warp::kUnitTiles, width_step, [&](int i) { finish_tile(tile - 1, i); });
        }
      });
    }
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kUnitTiles; ++i) finish_tile(Warp::kRowTiles - 1, i);
    if (thread == 0) wait_for_turn(given.turns + step, warp_first_unit() / kBlockH);
    block_barrier();
    float dx[Traits::kDxParts][Warp::kDxRowTiles][Warp::kDxPartTiles][4] = {};
    const auto nothing = [](int, const auto&) {};
    // The sums of a part leave while the next products run.
    warp.multiply_dhidden(dx[0], 0, nothing);
    warp.add_to_weights(stage, [&](int k) { add_dx(dx[0], step, 0, k, kBlockM / 16); });
    if constexpr (Traits::kStages == 2) {
      stage = Traits::kTokenBytes - stage;
    } else {
      block_barrier();
      begin_next(step, 0);
    }
    FUSEFORMER_UNROLL
    for (int part = 1; part < Traits::kDxParts; ++part) {
      warp.multiply_dhidden(dx[part], part, [&](int k, const auto&) {
        if (part > 1) add_dx(dx[part - 1], step, part - 1, k, kBlockH / 16);
      });
    }
    if constexpr (Traits::kDxParts > 1) {
      add_dx(dx[Traits::kDxParts - 1], step, Traits::kDxParts - 1, 0, 1);
    }
    publish();
  }
  block_barrier();
  if (thread == 0 && first < end) pass_turn(given.turns + first);

  write_sums(given, warp);
}

}  // namespace fuseformer
