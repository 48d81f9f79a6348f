// What comes after the backward kernel: gradients out of their sums, times dropout's factor.
#pragma once

#include "../device/element.h"
#include "backward_params.h"
#include "backward_traits.h"

namespace fuseformer {

constexpr int kFinishThreads = 256;

// Writes dx of a step, whose sums lie as the threads of the backward kernel hold them.
//
// Grid: (steps of tokens,), as many threads as the backward kernel has.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    feed_forward_finish_tokens_kernel(const FeedForwardGradientParams given) {
  using Element = typename Traits::Element;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const float* sums =
      given.dx_sums + int64_t{blockIdx.x} * (Traits::kBlockM * Traits::kWidth) + thread;
  const int64_t part_values = int64_t{gridDim.x} * (Traits::kBlockM * Traits::kWidth);
  const float factor = given.forward.seed == nullptr ? 1.0f : given.forward.dropout_scale;
  const int row = static_cast<int>(blockIdx.x) * Traits::kBlockM +
                  warp % Traits::kDxRowWarps * Traits::kDxRowTiles * 16 + lane / 4;
  const int column = warp / Traits::kDxRowWarps * Traits::kDxColumnTiles * 8 + lane % 4 * 2;
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Traits::kDxRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int token = row + 16 * tile + 8 * half;
      if (token >= given.forward.tokens) continue;
      Element* const dx =
          static_cast<Element*>(given.dx.data) + token * given.dx.row_stride + column;
      FUSEFORMER_UNROLL
      for (int i = 0; i < Traits::kDxColumnTiles; ++i) {
        const float* pair = sums + (4 * Traits::dx_place(tile, i) + 2 * half) * Traits::kThreads;
        float first = 0.0f, second = 0.0f;
        for (int part = 0; part < given.dx_parts; ++part, pair += part_values) {
          first += pair[0];
          second += pair[Traits::kThreads];
        }
        *reinterpret_cast<uint32_t*>(dx + 8 * i) = pack<Element>(first * factor, second * factor);
      }
    }
  }
}

// Writes eight numbers, the sums of splits that `sum_of` returns, times the factor.
template <typename Element, typename Function>
FUSEFORMER_DEVICE void finish_eight(void* target, int splits, float factor,
                                    const Function& summand) {
  float sums[8] = {};
  for (int split = 0; split < splits; ++split) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < 8; ++i) sums[i] += summand(split, i);
  }
  Sixteen packed;
  FUSEFORMER_UNROLL
  for (int i = 0; i < 4; ++i) {
    packed.words[i] = pack<Element>(sums[2 * i] * factor, sums[2 * i + 1] * factor);
  }
  copy_16(target, &packed);
}

// Writes the gradients of the weights and of the bias, eight numbers a thread: neighbouring threads
// read neighbouring columns, also of dw2, whose sums are those of its transpose.
//
// Grid: as many blocks as that takes.
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kFinishThreads)
    feed_forward_finish_weights_kernel(const FeedForwardGradientParams given) {
  const int hidden = given.forward.hidden;
  const int64_t eights = int64_t{hidden} / 8 * kWidth;  // of either matrix
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  const float factor = given.forward.seed == nullptr ? 1.0f : given.forward.dropout_scale;
  const auto weight_sums = [&](int split, int matrix) {
    return given.weight_sums + (int64_t{2} * split + matrix) * hidden * kWidth;
  };
  if (index < eights) {
    finish_eight<Element>(static_cast<Element*>(given.dw1) + 8 * index, given.splits, factor,
                          [&](int split, int i) { return weight_sums(split, 0)[8 * index + i]; });
  } else if (index < 2 * eights) {
    const int column = index % kWidth;
    const int64_t unit = (index - eights) / kWidth * 8;
    finish_eight<Element>(
        static_cast<Element*>(given.dw2) + int64_t{column} * hidden + unit, given.splits, factor,
        [&](int split, int i) { return weight_sums(split, 1)[(unit + i) * kWidth + column]; });
  } else if (index < 2 * eights + hidden / 8 && given.db1 != nullptr) {
    const int64_t unit = 8 * (index - 2 * eights);
    finish_eight<Element>(
        static_cast<Element*>(given.db1) + unit, given.splits, factor,
        [&](int split, int i) { return given.bias_sums[int64_t{split} * hidden + unit + i]; });
  }
}

}  // namespace fuseformer
