// Back through dropout(activation(pre)): the gradient before it, the activation anew, and the sums
// of the bias gradient, in one pass over memory.
#pragma once

#include "../device/element.h"
#include "activation.h"
#include "dropout.h"
#include "linear_params.h"

namespace fuseformer {

constexpr int kGradientThreads = 128;
constexpr int kGradientUnits = 64;  // of a block, by eights a thread
constexpr int kGradientLines = kGradientThreads / (kGradientUnits / 8);  // rows at once

// Shared memory: the sums of the lines, and random words of the groups of eight lanes, of which
// each begins at other banks.
constexpr int kGradientSumBytes = 4 * kGradientLines * kGradientUnits;
constexpr int kGroupBytes = 8 * 16 + 16;
constexpr int kGradientSharedBytes = kGradientSumBytes + kGradientThreads / 8 * kGroupBytes;

// Which of eight neighbouring units of a row dropout keeps, a bit each. The words for a unit decide
// 31 others too, of three more eights and of the row that is eight further: the eight lanes that
// have these, a group, compute the words of one unit each. All lanes of the warp take part.
FUSEFORMER_DEVICE uint32_t kept_of_eight(const ActivationGradientParams& params, int row, int unit,
                                         int group) {
  unsigned char* const shared = dynamic_shared() + kGradientSumBytes + group * kGroupBytes;
  const int eight = unit / 8 % 4, half = row / 8 % 2, place = eight + 4 * half;
  Sixteen words;
  dropout_words(words.words, seed_of(params.seed), 0, 0, row / 16 * 16 + row % 8,
                unit / 32 * 32 + place);
  warp_barrier();  // those of the last rows have been read
  copy_16(shared + 16 * place, &words);
  warp_barrier();
  uint32_t kept = 0;
  FUSEFORMER_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(shared + 16 * i + 4 * eight);
    kept |= static_cast<uint32_t>(is_kept(word, half, params.dropout_threshold)) << i;
  }
  return kept;
}

// Replaces dact by the gradient before the activation, and pre by the activation after dropout.
//
// Grid: (row blocks * unit blocks,), unit blocks fastest. A thread takes eight neighbouring units
// of a row: sixteen bytes. A warp has two rows, and those that are eight further. The warps' sums
// meet in shared memory.
template <typename Element, bool kDropout>
__global__ void __launch_bounds__(kGradientThreads)
    activation_gradient_kernel(const ActivationGradientParams params) {
  const int unit_blocks = (params.hidden + kGradientUnits - 1) / kGradientUnits;
  const int row_block = blockIdx.x / unit_blocks;
  const int chunk = threadIdx.x % 8, warp = threadIdx.x / 32, warp_line = threadIdx.x / 8 % 4;
  const int line = 2 * warp + warp_line % 2 + warp_line / 2 * 8;
  const int group = 4 * warp + 2 * (warp_line % 2) + chunk / 4;
  const int unit = static_cast<int>(blockIdx.x) % unit_blocks * kGradientUnits + 8 * chunk;
  float sums[8] = {};
  const int end = minimum(params.tokens, (row_block + 1) * kGradientRows);
  with_activation(params.activation, [&](auto kind) {
    for (int first = row_block * kGradientRows; first < end; first += kGradientLines) {
      const int row = first + line;
      [[maybe_unused]] uint32_t kept = 0;
      if constexpr (kDropout) kept = kept_of_eight(params, row, unit, group);
      if (row >= end || unit >= params.hidden) continue;
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
            const bool keeps = kept >> (2 * word + j) & 1;
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
    for (int other = 0; other < kGradientLines; ++other)
      sum += shared[other * kGradientUnits + column];
    params.dbias[static_cast<int64_t>(row_block) * params.hidden + first + column] = sum;
  }
}

}  // namespace fuseformer
