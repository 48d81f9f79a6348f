// Feed-forward, backward, resident regime: all gradients in one pass, and nothing of the size of
// the hidden layer in memory.
//
// With h = x w1^T + b1, a = act(h) and da = dy w2, both where dropout keeps the unit and 0
// elsewhere, and dh = da act'(h): dw2 = dy^T a, dw1 = dh^T x, db1 = colsum(dh), dx = dh w1, all of
// them times dropout's factor. A block owns hidden units and a range of tokens: its weight
// gradients stay in registers, and blocks of the same tokens add to dx one after the other, in the
// order of their units: the sum is the same in every run. Where tokens are few, each block would
// wait for many others: several sums of dx, which blocks take by turns, shorten the chain.
#pragma once

#include "../device/atomic.h"
#include "activation.h"
#include "backward_warp.h"
#include "dropout.h"

namespace fuseformer {

// Grid: (unit blocks * splits of the tokens,), unit blocks fastest. Shared memory: see the traits.
template <typename Traits, typename Kind, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    feed_forward_backward_kernel(const FeedForwardGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = FeedForwardBackwardWarp<Traits>;
  using Place = typename Warp::Place;
  constexpr int kBlockM = Traits::kBlockM, kBlockH = Traits::kBlockH, kWidth = Traits::kWidth;
  constexpr int kThreads = Traits::kThreads;
  constexpr bool kFull = kWidth > 64;  // sums leave no registers

  const FeedForwardParams& params = given.forward;
  const auto [block_unit, split] = unit_block<Traits>(given, blockIdx.x);
  const int units = params.hidden - block_unit;
  const int steps = (params.tokens + kBlockM - 1) / kBlockM;
  const int split_steps = (steps + given.splits - 1) / given.splits;
  const int first = split * split_steps, end = minimum(steps, first + split_steps);

  const int thread = threadIdx.x, lane = thread % 32, index = thread / 32;
  const int warp_unit = index % Traits::kUnitWarps * Warp::kUnitTiles * 8;
  const int warp_units = units - warp_unit;  // that exist
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
    const uint32_t pair =
        exists ? static_cast<const uint32_t*>(params.b1)[(block_unit + unit) / 2] : 0;
    biases[unit] = unpack<Element>(pair, unit % 2);
  }
  for (int i = thread; i < Traits::kBiasSums; i += kThreads) biases[kBlockH + i] = 0.0f;
  int stage = 0;
  const auto begin_next = [&](int step, int to) {
    const bool more = step > first;
    // What the copies of a thread are is computed in each step: there are no registers to keep it.
    const int copier = thread_again<kThreads>();
    const TokenCopy x_copy(copier, params.x.row_stride), dy_copy(copier, given.dy.row_stride);
    x_copy.begin_if(token_tile + to, rows_of(params.x, step - 1) + x_copy.start, more);
    dy_copy.begin_if(dy_tile + to, rows_of(given.dy, step - 1) + dy_copy.start, more);
    copy_async_commit();
  };
  // Blocks of units have the sums of dx in turns, the ones whose numbers `dx_parts` divides alike
  // the same. Which these are, how many go before, and the end of the steps lie in shared memory:
  // there are no registers.
  int* const order = reinterpret_cast<int*>(dynamic_shared() + Traits::kOrderOffset);
  if (thread == 0) {
    const int block = block_unit / kBlockH;
    order[0] = block % given.dx_parts * steps;
    order[1] = block / given.dx_parts;
    order[2] = end;
  }
  const auto dx_step = [&](int step) { return order[0] + step; };
  // Two stages leave no register for it; with one, ptxas spills where it is read from memory.
  const auto steps_end = [&] { return Traits::kStages == 2 ? order[2] : end; };
  // Adds to dx of a step what one part of the columns has summed.
  using DxPart = float[Warp::kDxRowTiles][Warp::kDxPartTiles][4];
  const auto add_dx = [&](const DxPart& dx, int step, int part) {
    float* const sums =
        given.dx_sums + int64_t{dx_step(step)} * (kBlockM * kWidth) + thread_again<kThreads>();
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < Warp::kDxRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kDxPartTiles; ++i) {
        const int place = 4 * Traits::dx_place(tile, part * Warp::kDxPartTiles + i);
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) atomic_add(sums + (place + j) * kThreads, dx[tile][i][j]);
      }
    }
  };
  // Keeps the lane's units of a tile for other warps: those of a tile lie `stored` bytes and
  // further. Such as do not exist are 0 where dy is infinite, too.
  const auto store = [&](const float (&values)[4], int tile, int i, int stored) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t packed = pack<Element>(values[2 * half], values[2 * half + 1]);
      *reinterpret_cast<uint32_t*>(dynamic_shared() + (stored ^ 16 * i) +
                                   (16 * tile + 8 * half) * Tile<kBlockH>::kRowBytes) =
          8 * i < warp_units ? packed : 0;
    }
  };
  for (int step = end - 1; step >= first; --step) {
    // Everyone has left the last step, and this step's copies are in.
    copy_async_wait<0>();
    block_barrier();
    if (thread_again<kThreads>() == 0 && step + 1 < steps_end())
      pass_turn(given.turns + dx_step(step + 1));
    if constexpr (Traits::kStages == 2) begin_next(step, Traits::kTokenBytes - stage);
    warp.compute_addresses_again();

    uint32_t kept = 0;
    using Decisions = UnitDecisions<Warp::kRowTiles, Warp::kUnitTiles>;
    const auto decisions = [&] {
      // Neither the seed nor the lane's place is kept from step to step.
      const Place place;
      uint32_t left = warp_units;
      compute_again(left);
      const int unit = params.hidden - static_cast<int>(left) + place.lane % 4 * 2;
      return Decisions{seed_of(params.seed), step * kBlockM + place.row(), unit,
                       params.dropout_threshold};
    };
    // The few draws of one sixteen of rows come first; those of more are made one by one while
    // products run: together they would take too many registers.
    constexpr bool kDrawsFirst = Warp::kRowTiles == 1;
    if constexpr (kDropout && kDrawsFirst) {
      FUSEFORMER_UNROLL
      for (int draw = 0; draw < Decisions::kDraws; ++draw) decisions().keep(draw, kept);
    }
    float hidden[Warp::kRowTiles][Warp::kUnitTiles][4];
    const int lane_unit = Place().unit();
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kUnitTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) hidden[tile][i][j] = biases[lane_unit + 8 * i + j % 2];
      }
    }
    warp.multiply_tokens(hidden, stage, [&](int width_step, const auto&) {
      if constexpr (kDropout && !kDrawsFirst) {
        warp.share(Decisions::kDraws, width_step, [&](int draw) {
          if constexpr (kFull) {
            // Bits that wait for those of the draw before would keep its words in registers.
            uint32_t drawn = 0;
            decisions().keep(draw, drawn);
            kept |= drawn;
          } else {
            decisions().keep(draw, kept);
          }
        });
      }
    });
    const int stored = Place().stored();
    const auto activate_tile = [&](auto kind, int place) {
      const int tile = place / Warp::kUnitTiles, i = place % Warp::kUnitTiles;
      float values[4];
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& slope = hidden[tile][i][j];  // in the place of what it is the slope at
        values[j] = activate_with_slope<decltype(kind)::value>(slope, slope);
        if (kDropout && !(kept >> (4 * place + j) & 1)) values[j] = slope = 0.0f;
      }
      store(values, tile, i, stored);
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
    float dhidden[Traits::kDyParts][Warp::kDyPartTiles][Warp::kUnitTiles][4] = {};
    const int stored_gradient = Place().stored() + Traits::kHiddenBytes;
    const auto finish_tile = [&](int part, int place) {
      const int tile = place / Warp::kUnitTiles, i = place % Warp::kUnitTiles;
      float (&gradient)[4] = dhidden[part][tile][i];
      const int row_tile = part * Warp::kDyPartTiles + tile;
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) gradient[j] *= hidden[row_tile][i][j];
      store(gradient, row_tile, i, stored_gradient);
    };
    constexpr int kPartTiles = Warp::kDyPartTiles * Warp::kUnitTiles;
    FUSEFORMER_UNROLL
    for (int part = 0; part < Traits::kDyParts; ++part) {
      warp.multiply_dy(dhidden[part], part, stage, [&](int width_step, const auto&) {
        if constexpr (!kChooses) {
          if (part == 0) {
            warp.share(kTiles, width_step, [&](int place) { activate_tile(Kind(), place); });
          }
        }
        if (part > 0) {
          warp.share(kPartTiles, width_step, [&](int place) { finish_tile(part - 1, place); });
        }
      });
    }
    FUSEFORMER_UNROLL
    for (int place = 0; place < kPartTiles; ++place) finish_tile(Traits::kDyParts - 1, place);
    block_barrier();
    warp.add_to_weights(stage);
    // The turn is held for one product of five. It is waited for ahead of a barrier, behind which
    // all threads may add, and nobody reads the tokens of this step any more.
    if (thread == 0) wait_for_turn(given.turns + dx_step(step), order[1]);
    block_barrier();
    if constexpr (Traits::kStages == 2) {
      stage = Traits::kTokenBytes - stage;
    } else {
      begin_next(step, 0);
    }
    FUSEFORMER_UNROLL
    for (int part = 0; part < Traits::kDxParts; ++part) {
      float dx[Warp::kDxRowTiles][Warp::kDxPartTiles][4] = {};
      warp.multiply_dhidden(dx, part, [](int, const auto&) {});
      add_dx(dx, step, part);
    }
  }
  block_barrier();
  uint32_t last_step = first;
  // Where there is room, the comparison with `end` is made once, before the loop.
  if constexpr (kFull) compute_again(last_step);
  if (thread == 0 && static_cast<int>(last_step) < steps_end())
    pass_turn(given.turns + dx_step(last_step));

  write_sums(given, warp);
}

}  // namespace fuseformer
