// Back through dropout(activation(pre)): the gradient before it, the activation anew, and the sums
// of the bias gradient, in one pass over memory.
#pragma once

#include "../device/element.h"
#include "activation.h"
#include "dropout.h"
#include "linear_params.h"

namespace fuseformer {

constexpr int kGradientThreads = 128;
constexpr int kGradientUnits = 64;  // of a block

// Replaces dact by the gradient before the activation, and pre by the activation after dropout.
//
// Grid: (row blocks * unit blocks,), unit blocks fastest. A thread takes eight neighbouring units
// of a row: sixteen bytes. The warps' sums meet in shared memory.
template <typename Element, bool kDropout>
__global__ void __launch_bounds__(kGradientThreads)
    activation_gradient_kernel(const ActivationGradientParams params) {
  const int unit_blocks = (params.hidden + kGradientUnits - 1) / kGradientUnits;
  const int row_block = blockIdx.x / unit_blocks;
  const int chunk = threadIdx.x % (kGradientUnits / 8), line = threadIdx.x / (kGradientUnits / 8);
  constexpr int kLines = kGradientThreads / (kGradientUnits / 8);
  const int unit = static_cast<int>(blockIdx.x) % unit_blocks * kGradientUnits + 8 * chunk;
  float sums[8] = {};
  const int end = minimum(params.tokens, (row_block + 1) * kGradientRows);
  with_activation(params.activation, [&](auto kind) {
    for (int row = row_block * kGradientRows + line; row < end && unit < params.hidden;
         row += kLines) {
      Element* const dact = static_cast<Element*>(params.dact.data) + row * params.dact.row_stride;
      Element* const pre = static_cast<Element*>(params.pre.data) + row * params.pre.row_stride;
      Sixteen gradient, before;
      copy_16(&gradient, dact + unit);
      copy_16(&before, pre + unit);
      FUSEFORMER_UNROLL
      for (int word = 0; word < 4; ++word) {
        float act[2], dpre[2];
        FUSEFORMER_UNROLL
        for (int j = 0; j < 2; ++j) {
          float slope;
          act[j] = activate_with_slope<decltype(kind)::value>(
              unpack<Element>(before.words[word], j), slope);
          dpre[j] = unpack<Element>(gradient.words[word], j) * slope;
          if constexpr (kDropout) {
            const bool keeps = keeps_unit(seed_of(params.seed), row, unit + 2 * word + j,
                                          params.dropout_threshold);
            act[j] = keeps ? act[j] * params.dropout_scale : 0.0f;
            dpre[j] = keeps ? dpre[j] * params.dropout_scale : 0.0f;
          }
          sums[2 * word + j] += dpre[j];
        }
        gradient.words[word] = pack<Element>(dpre[0], dpre[1]);
        before.words[word] = pack<Element>(act[0], act[1]);
      }
      copy_16(dact + unit, &gradient);
      copy_16(pre + unit, &before);
    }
  });
  if (params.dbias == nullptr) return;
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  FUSEFORMER_UNROLL
  for (int i = 0; i < 8; ++i) shared[line * kGradientUnits + 8 * chunk + i] = sums[i];
  block_barrier();
  const int column = threadIdx.x;
  const int first = static_cast<int>(blockIdx.x) % unit_blocks * kGradientUnits;
  if (column < kGradientUnits && first + column < params.hidden) {
    float sum = 0.0f;
    for (int other = 0; other < kLines; ++other) sum += shared[other * kGradientUnits + column];
    params.dbias[static_cast<int64_t>(row_block) * params.hidden + first + column] = sum;
  }
}

}  // namespace fuseformer
