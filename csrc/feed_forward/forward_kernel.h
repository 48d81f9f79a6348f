// Feed-forward, forward: one block of tokens, over steps of hidden units, which live in registers
// only, as the weights of flash attention do.
#pragma once

#include "../device/tile.h"
#include "activation.h"
#include "dropout.h"
#include "params.h"
#include "traits.h"

namespace fuseformer {

// What one warp holds in registers, and where its operands lie in shared memory.
template <typename Traits>
struct FeedForwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kRowTiles = Traits::kRowTiles;
  static constexpr int kHiddenTiles = Traits::kBlockH / 8;
  static constexpr int kOutTiles = Traits::kWidth / 8;
  static constexpr int kWidthSteps = Traits::kWidth / 16;

  float out[kRowTiles][kOutTiles][4];
  uint32_t x[kRowTiles][kWidthSteps][4];
  LaneAddresses<Traits::kWidth> w1_addresses;
  LaneAddresses<Traits::kBlockH> w2_addresses;

  // hidden += x @ w1.T, with a call of `between` before each sixteen of the width.
  template <typename Between>
  FUSEFORMER_DEVICE void multiply_tokens(float (&hidden)[kRowTiles][kHiddenTiles][4],
                                         const Between& between) const {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kWidthSteps; ++step) {
      between(step);
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kHiddenTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, w1_addresses.at(pair, step));
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<Element>(hidden[tile][2 * pair], x[tile][step], b[0], b[1]);
          mma_16x8x16<Element>(hidden[tile][2 * pair + 1], x[tile][step], b[2], b[3]);
        }
      }
    }
  }

  // out += hidden @ w2.T
  FUSEFORMER_DEVICE void multiply_hidden(const float (&hidden)[kRowTiles][kHiddenTiles][4]) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHiddenTiles / 2; ++step) {
      uint32_t a[kRowTiles][4];
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) as_operand<Element>(a[tile], hidden[tile], step);
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kOutTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, w2_addresses.at(pair, step));
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<Element>(out[tile][2 * pair], a[tile], b[0], b[1]);
          mma_16x8x16<Element>(out[tile][2 * pair + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }
};

// Grid: (token blocks,). Shared memory: two stages of w1's rows and w2's columns, of which the
// second holds the tokens before the first step, then two stages of b1. The output leaves through
// the first bytes of it.
template <typename Traits, Activation kActivation, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    feed_forward_forward_kernel(const FeedForwardParams params) {
  using Element = typename Traits::Element;
  using Warp = FeedForwardWarp<Traits>;
  using TokenLayout = Tile<Traits::kWidth>;
  constexpr int kBlockM = Traits::kBlockM, kBlockH = Traits::kBlockH;
  constexpr int kWidth = Traits::kWidth, kThreads = Traits::kThreads;

  // Whether random words leave no registers for what all steps have in common. A number of the
  // thread that is known not to be negative takes fewer, too.
  constexpr bool kComputesAgain = kDropout && kWidth > 128;
  const int block_row = blockIdx.x * kBlockM;
  const int thread = kComputesAgain ? threadIdx.x % kThreads : threadIdx.x, lane = thread % 32,
            warp_row = thread / 32 * Warp::kRowTiles * 16;
  const int lane_row = block_row + warp_row + lane / 4, lane_column = lane % 4 * 2;
  const char* w1_rows = static_cast<const char*>(params.w1);
  const char* w2_rows = static_cast<const char*>(params.w2.data);
  const char* b1 = static_cast<const char*>(params.b1);
  const TileCopy<kWidth, kBlockH, kThreads> w1_copy(thread, kWidth);
  const TileCopy<kBlockH, kWidth, kThreads> w2_copy(thread, params.w2.row_stride);
  constexpr int kW1Step = 2 * kBlockH * kWidth;

  const SharedAddress weights = shared_address(dynamic_shared());
  const SharedAddress biases = weights + Traits::kTileBytes;
  const SharedAddress tokens = weights + Traits::kStageBytes;
  Warp warp;
  warp.w1_addresses = LaneAddresses<kWidth>::in_column_order(weights, lane);
  warp.w2_addresses = LaneAddresses<kBlockH>::in_column_order(weights + Traits::kWeightBytes, lane);

  // Only the first step may reach past the last hidden unit: steps are taken from the end.
  const int last = (params.hidden + kBlockH - 1) / kBlockH - 1;
  const char* x_rows =
      static_cast<const char*>(params.x.data) + int64_t{2} * block_row * params.x.row_stride;
  const TileCopy<kWidth, kBlockM, kThreads> x_copy(thread, params.x.row_stride);
  x_copy.begin_bounded(tokens, x_rows, params.tokens - block_row);
  if (last >= 0) {
    const int units = params.hidden - last * kBlockH;
    w1_copy.begin_bounded(weights, w1_rows + int64_t{last} * kW1Step, units);
    w2_copy.begin_narrow(weights + Traits::kWeightBytes, w2_rows + 2 * last * kBlockH, units);
    // A thread copies eight numbers of b1; without one there are zeros in both stages.
    if (thread < kBlockH / 8) {
      const bool exists = params.b1 != nullptr && 8 * thread < units;
      copy_async_16_or_zero(biases + 16 * thread, b1 + 2 * last * kBlockH + 16 * thread, exists);
      copy_async_16_or_zero(biases + Traits::kBiasBytes + 16 * thread, b1, false);
    }
  }
  copy_async_commit();

  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kOutTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) warp.out[tile][i][j] = 0.0f;
    }
  }
  PhiloxKey seed{0, 0};
  if constexpr (kDropout && !kComputesAgain) seed = seed_of(params.seed);
  const auto x_addresses =
      LaneAddresses<kWidth>::in_row_order(tokens + warp_row * TokenLayout::kRowBytes, lane);
  copy_async_wait<0>();
  block_barrier();
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < Warp::kWidthSteps; ++step) {
      ldmatrix_x4(warp.x[tile][step], x_addresses.at(tile, step));
    }
  }

  // Where the copies of the next step begin.
  const char* w1_next = w1_rows + int64_t{last - 1} * kW1Step + w1_copy.start;
  const char* w2_next = w2_rows + 2 * (last - 1) * kBlockH + w2_copy.start;
  int stage = 0;
  const auto take = [&](auto ragged, int step) {
    // Everyone has left the last step: what it read may be overwritten, this step's copies are in.
    copy_async_wait<0>();
    block_barrier();
    const auto copy_next = [&] {
      const bool more = step > 0;
      const SharedAddress other = weights + (stage ^ 1) * Traits::kStageBytes;
      w1_copy.begin_if(other, w1_next, more);
      w2_copy.begin_if(other + Traits::kWeightBytes, w2_next, more);
      copy_async_16_if(biases + (stage ^ 1) * Traits::kBiasBytes + 16 * thread,
                       b1 + 2 * (step - 1) * kBlockH + 16 * thread,
                       more && b1 != nullptr && thread < kBlockH / 8);
      copy_async_commit();
      w1_next -= kW1Step;
      w2_next -= 2 * kBlockH;
    };
    float hidden[Warp::kRowTiles][Warp::kHiddenTiles][4] = {};
    warp.w1_addresses.compute_phases_again();
    warp.w2_addresses.compute_phases_again();
    // The addresses of the copies are computed while products run: hence not before the first ones.
    warp.multiply_tokens(hidden, [&](int width_step) {
      if (width_step == 2) copy_next();
    });
    const unsigned char* bias =
        dynamic_shared() + Traits::kTileBytes + stage * Traits::kBiasBytes + 2 * lane_column;
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kHiddenTiles; ++i) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(bias + 16 * i);
      const float b1_values[2] = {unpack<Element>(pair, 0), unpack<Element>(pair, 1)};
      // Units that do not exist have the activation of 0, or NaN where a token is infinite.
      const bool exists = !decltype(ragged)::value || step * kBlockH + 8 * i < params.hidden;
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float value = hidden[tile][i][j] + b1_values[j % 2];
          hidden[tile][i][j] = exists ? activate<kActivation>(value) : 0.0f;
        }
      }
    }
    if constexpr (kDropout) {
      const int place = kComputesAgain ? thread_again<kThreads>() : thread;
      const int row = block_row + place / 32 * Warp::kRowTiles * 16 + place % 32 / 4;
      drop_units(hidden, kComputesAgain ? seed_of(params.seed) : seed, row,
                 step * kBlockH + place % 4 * 2, params.dropout_threshold);
    }
    warp.multiply_hidden(hidden);
    const int turn = stage == 0 ? Traits::kStageBytes : -Traits::kStageBytes;
    warp.w1_addresses.phase[0] += turn;
    warp.w2_addresses.phase[0] += turn;
    stage ^= 1;
  };
  int step = last;
  if (params.hidden % kBlockH != 0) take(Constant<true>(), step--);
  for (; step >= 0; --step) take(Constant<false>(), step);

  // Dropout's factor is common to all summands of an output. Each warp writes its own rows, over
  // weights that others read up to the barrier.
  const float factor = kDropout ? params.dropout_scale : 1.0f;
  copy_async_wait<0>();
  block_barrier();
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kOutTiles; ++i) {
    uint32_t pair = 0;
    if (params.b2 != nullptr) {
      pair = static_cast<const uint32_t*>(params.b2)[4 * i + lane % 4];
    }
    const float b2[2] = {unpack<Element>(pair, 0), unpack<Element>(pair, 1)};
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row - block_row + 16 * tile + 8 * half;
        const float* out = warp.out[tile][i] + 2 * half;
        *reinterpret_cast<uint32_t*>(dynamic_shared() + TokenLayout::offset(row, i) +
                                     lane_column * 2) =
            pack<Element>(out[0] * factor + b2[0], out[1] * factor + b2[1]);
      }
    }
  }
  warp_barrier();
  char* y_rows = static_cast<char*>(params.y.data) + int64_t{2} * block_row * params.y.row_stride;
  constexpr int kRows = Warp::kRowTiles * 16;
  for (int chunk = lane; chunk < kRows * TokenLayout::kChunks; chunk += 32) {
    const int row = warp_row + chunk / TokenLayout::kChunks;
    const int column = chunk % TokenLayout::kChunks;
    if (block_row + row < params.tokens) {
      copy_16(y_rows + 2 * row * params.y.row_stride + column * 16,
              dynamic_shared() + TokenLayout::offset(row, column));
    }
  }
}

}  // namespace fuseformer
