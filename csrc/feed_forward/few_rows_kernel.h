// Feed-forward of a few tokens: products whose time is that of reading the weights, once each.
//
// A lane multiplies the very sixteens of bytes that it has copied: the order of columns is free as
// long as both operands have the same. So nobody waits for others before the sums of a block's
// warps, which share its columns, meet; those of several blocks do by a second kernel.
#pragma once

#include "../device/copy.h"
#include "../device/mma.h"
#include "activation.h"
#include "dropout.h"
#include "few_rows_params.h"
#include "few_rows_traits.h"

namespace fuseformer {

// Two neighbouring sums, which are read and written at once.
struct alignas(8) SumPair {
  float low;
  float high;
};

// Leaves the products of a block over the columns from `begin` to `end` in shared memory, a part
// for each warp.
template <typename Traits>
FUSEFORMER_DEVICE void multiply_few_rows(const FewRowsParams& params, int block_unit, int begin,
                                         int end) {
  using Element = typename Traits::Element;
  constexpr int kTiles = Traits::kTiles, kUnits = Traits::kUnits;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const char* w_rows[kTiles];
  bool w_exists[kTiles];
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    const RowTensor& w = 8 * tile < kUnits ? params.w : params.w_up;
    const int unit = block_unit + 8 * tile % kUnits + lane / 4;
    w_exists[tile] = unit < params.units;
    w_rows[tile] = static_cast<const char*>(w.data) + 2 * (unit * w.row_stride);
  }
  const char* x_rows[2];
  bool x_exists[2];
  FUSEFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    x_exists[half] = row < params.tokens;
    x_rows[half] = static_cast<const char*>(params.x.data) + 2 * (row * params.x.row_stride);
  }

  // Of a chunk a lane has two sixteens of each of its rows of weights, then of its tokens; those of
  // the other lanes lie between.
  constexpr int kRowBytes = 16 * 32, kPartBytes = (kTiles + 2) * kRowBytes;
  const int mine = warp * Traits::kStages * Traits::kStageBytes + 16 * lane;
  const SharedAddress stages = shared_address(dynamic_shared()) + mine;
  const auto begin_copies = [&](int first, int stage) {
    if (first < end) {
      FUSEFORMER_UNROLL
      for (int part = 0; part < 2; ++part) {
        const int column = first + 32 * part + lane % 4 * 8;
        const bool exists = column < end;
        const SharedAddress target = stages + stage + part * kPartBytes;
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          copy_async_16_or_zero(target + tile * kRowBytes, w_rows[tile] + int64_t{2} * column,
                                exists && w_exists[tile]);
        }
        FUSEFORMER_UNROLL
        for (int half = 0; half < 2; ++half) {
          copy_async_16_or_zero(target + (kTiles + half) * kRowBytes,
                                x_rows[half] + int64_t{2} * column, exists && x_exists[half]);
        }
      }
    }
    copy_async_commit();
  };
  constexpr int kStep = Traits::kWarps * Traits::kChunk;
  constexpr int kAllStages = Traits::kStages * Traits::kStageBytes;
  int first = begin + warp * Traits::kChunk;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Traits::kStages - 1; ++i) {
    begin_copies(first + i * kStep, i * Traits::kStageBytes);
  }
  float sums[kTiles][4] = {};
  for (int stage = 0; first < end; first += kStep) {
    copy_async_wait<Traits::kStages - 2>();
    // The stage before this one was multiplied in the last step, by this lane.
    const int before = stage == 0 ? kAllStages - Traits::kStageBytes : stage - Traits::kStageBytes;
    begin_copies(first + (Traits::kStages - 1) * kStep, before);
    FUSEFORMER_UNROLL
    for (int part = 0; part < 2; ++part) {
      const unsigned char* source = dynamic_shared() + mine + stage + part * kPartBytes;
      Sixteen low, high;
      copy_16(&low, source + kTiles * kRowBytes);
      copy_16(&high, source + (kTiles + 1) * kRowBytes);
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        Sixteen b;
        copy_16(&b, source + tile * kRowBytes);
        FUSEFORMER_UNROLL
        for (int i = 0; i < 4; i += 2) {
          const uint32_t a[4] = {low.words[i], high.words[i], low.words[i + 1], high.words[i + 1]};
          mma_16x8x16<Element>(sums[tile], a, b.words[i], b.words[i + 1]);
        }
      }
    }
    stage = stage + Traits::kStageBytes == kAllStages ? 0 : stage + Traits::kStageBytes;
  }

  // Sums lie where stages of other warps were.
  copy_async_wait<0>();
  block_barrier();
  float* const part = reinterpret_cast<float*>(dynamic_shared()) +
                      warp * Traits::kRows * Traits::kSumStride + lane % 4 * 2;
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* const target = part + (lane / 4 + 8 * half) * Traits::kSumStride + 8 * tile;
      *reinterpret_cast<SumPair*>(target) = {sums[tile][2 * half], sums[tile][2 * half + 1]};
    }
  }
  block_barrier();
}

// The sums that all warps have of two columns of a row.
template <typename Traits>
FUSEFORMER_DEVICE SumPair sum_of_warps(int row, int column) {
  SumPair sum = {0.0f, 0.0f};
  FUSEFORMER_UNROLL
  for (int warp = 0; warp < Traits::kWarps; ++warp) {
    const float* place = reinterpret_cast<const float*>(dynamic_shared()) +
                         (warp * Traits::kRows + row) * Traits::kSumStride + column;
    const SumPair part = *reinterpret_cast<const SumPair*>(place);
    sum.low += part.low;
    sum.high += part.high;
  }
  return sum;
}

template <typename Element>
FUSEFORMER_DEVICE void add_bias(SumPair& sum, const void* bias, int unit) {
  if (bias == nullptr) return;
  const uint32_t pair =
      *reinterpret_cast<const uint32_t*>(static_cast<const Element*>(bias) + unit);
  sum.low += unpack<Element>(pair, 0);
  sum.high += unpack<Element>(pair, 1);
}

template <typename Element>
FUSEFORMER_DEVICE void write_pair(const RowTensor& target, int row, int unit, SumPair values) {
  *reinterpret_cast<uint32_t*>(static_cast<Element*>(target.data) + row * target.row_stride +
                               unit) = pack<Element>(values.low, values.high);
}

// Calls `function` with each row and pair of units of a block that exist, shared among its threads.
template <typename Traits, typename Function>
FUSEFORMER_DEVICE void for_each_pair(const FewRowsParams& params, int block_unit,
                                     const Function& function) {
  constexpr int kPairs = Traits::kUnits / 2;
  for (int index = threadIdx.x; index < Traits::kRows * kPairs; index += Traits::kThreads) {
    const int row = index / kPairs, column = index % kPairs * 2;
    if (row < params.tokens && block_unit + column < params.units) function(row, column);
  }
}

// The first product, or both of a gated block, up to the hidden activation.
//
// Grid: (unit blocks,). Shared memory: the sums of each warp.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    few_rows_hidden_kernel(const FewRowsParams params) {
  using Element = typename Traits::Element;
  const int block_unit = blockIdx.x * Traits::kUnits;
  multiply_few_rows<Traits>(params, block_unit, 0, params.columns);
  with_activation(params.activation, [&](auto kind) {
    for_each_pair<Traits>(params, block_unit, [&](int row, int column) {
      constexpr Activation kActivation = decltype(kind)::value;
      const int unit = block_unit + column;
      SumPair sum = sum_of_warps<Traits>(row, column);
      add_bias<Element>(sum, params.bias, unit);
      SumPair act = {activate<kActivation>(sum.low), activate<kActivation>(sum.high)};
      if (params.pre.data != nullptr) write_pair<Element>(params.pre, row, unit, sum);
      if constexpr (Traits::kMatrices == 2) {
        const SumPair up = sum_of_warps<Traits>(row, Traits::kUnits + column);
        if (params.up.data != nullptr) write_pair<Element>(params.up, row, unit, up);
        act.low *= up.low;
        act.high *= up.high;
      }
      if (params.seed != nullptr) {
        const auto drop = [&](float& value, int j) {
          const bool keeps =
              keeps_unit(seed_of(params.seed), row, unit + j, params.dropout_threshold);
          value = keeps ? value * params.dropout_scale : 0.0f;
        };
        drop(act.low, 0);
        drop(act.high, 1);
      }
      write_pair<Element>(params.out, row, unit, act);
    });
  });
}

// The last product, over a part of its columns.
//
// Grid: (unit blocks * splits,), unit blocks fastest. Shared memory as above.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    few_rows_output_kernel(const FewRowsParams params) {
  const int unit_blocks = (params.units + Traits::kUnits - 1) / Traits::kUnits;
  const int split = static_cast<int>(blockIdx.x) / unit_blocks;
  const int block_unit = static_cast<int>(blockIdx.x) % unit_blocks * Traits::kUnits;
  const int begin = split * params.split_columns;
  multiply_few_rows<Traits>(params, block_unit, begin,
                            minimum(begin + params.split_columns, params.columns));
  for_each_pair<Traits>(params, block_unit, [&](int row, int column) {
    const int unit = block_unit + column;
    SumPair sum = sum_of_warps<Traits>(row, column);
    if (params.partial != nullptr) {
      const int64_t place = int64_t{split} * params.tokens + row;
      *reinterpret_cast<SumPair*>(params.partial + place * params.units + unit) = sum;
    } else {
      add_bias<typename Traits::Element>(sum, params.bias, unit);
      write_pair<typename Traits::Element>(params.out, row, unit, sum);
    }
  });
}

// The sums of all parts, in their order, and the bias.
//
// Grid: pairs of units of all tokens / kSumThreads.
template <typename Element>
__global__ void __launch_bounds__(kSumThreads) few_rows_sum_kernel(const FewRowsParams params) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int pairs = params.units / 2;
  const int row = static_cast<int>(index / pairs), unit = static_cast<int>(index % pairs) * 2;
  if (row >= params.tokens) return;
  SumPair sum = {0.0f, 0.0f};
  for (int split = 0; split < params.splits; ++split) {
    const int64_t place = int64_t{split} * params.tokens + row;
    const SumPair part =
        *reinterpret_cast<const SumPair*>(params.partial + place * params.units + unit);
    sum.low += part.low;
    sum.high += part.high;
  }
  add_bias<Element>(sum, params.bias, unit);
  write_pair<Element>(params.out, row, unit, sum);
}

}  // namespace fuseformer
