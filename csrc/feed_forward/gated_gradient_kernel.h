// Back through dropout(activation(gate_pre) * up): both gradients, and the activation anew, in one
// pass over memory.
#pragma once

#include "../device/element.h"
#include "activation.h"
#include "dropout.h"
#include "gated_params.h"

namespace fuseformer {

constexpr int kGatedWarps = 4;
constexpr int kGatedRows = 16 * kGatedWarps;  // of a block: a warp takes sixteen
constexpr int kGatedUnits = 128;              // of a block: four words of kept units for each row

// Grid: (row blocks * unit blocks,), unit blocks fastest. A thread takes eight neighbouring units
// of a row at a time: sixteen bytes. One call of the random numbers decides eight units, two of
// each of four threads, hence the shared memory: a bit for each unit of the block.
template <typename Element, bool kDropout>
__global__ void __launch_bounds__(32 * kGatedWarps)
    gated_gradient_kernel(const GatedGradientParams params) {
  constexpr int kChunks = kGatedUnits / 8, kWords = kGatedUnits / 32;
  const int unit_blocks = (params.hidden + kGatedUnits - 1) / kGatedUnits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = static_cast<int>(blockIdx.x) / unit_blocks * kGatedRows + 16 * warp;
  const int first_unit = static_cast<int>(blockIdx.x) % unit_blocks * kGatedUnits;
  uint32_t* const kept = reinterpret_cast<uint32_t*>(dynamic_shared()) + 16 * kWords * warp;
  if constexpr (kDropout) {
    const int row = lane / kWords, word = lane % kWords;
    uint32_t bits[2] = {};
    FUSEFORMER_UNROLL
    for (int column = 0; column < 8; ++column) {
      uint32_t words[4];
      dropout_words(words, seed_of(params.seed), 0, 0, first_row + row,
                    first_unit + 32 * word + column);
      FUSEFORMER_UNROLL
      for (int i = 0; i < 4; ++i) {
        FUSEFORMER_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t keeps = is_kept(words[i], half, params.dropout_threshold);
          bits[half] |= keeps << (8 * i + column);
        }
      }
    }
    kept[row * kWords + word] = bits[0];
    kept[(row + 8) * kWords + word] = bits[1];
    warp_barrier();
  }

  const int chunk = lane % kChunks, unit = first_unit + 8 * chunk;
  if (unit >= params.hidden) return;
  const auto place = [&](const RowTensor& x, int row) {
    return static_cast<Element*>(x.data) + (first_row + row) * x.row_stride + unit;
  };
  with_activation(params.activation, [&](auto kind) {
    for (int row = lane / kChunks; row < 16 && first_row + row < params.tokens;
         row += 32 / kChunks) {
      Sixteen dact, gate, up;
      copy_16(&dact, place(params.dact, row));
      copy_16(&gate, place(params.gate_pre, row));
      copy_16(&up, place(params.up, row));
      [[maybe_unused]] uint32_t keeps = 0;
      if constexpr (kDropout) keeps = kept[row * kWords + chunk / 4] >> (chunk % 4 * 8);
      FUSEFORMER_UNROLL
      for (int word = 0; word < 4; ++word) {
        float act[2], dgate[2], dup[2];
        FUSEFORMER_UNROLL
        for (int j = 0; j < 2; ++j) {
          float slope;
          const float gated = activate_with_slope<decltype(kind)::value>(
              unpack<Element>(gate.words[word], j), slope);
          const float other = unpack<Element>(up.words[word], j);
          float gradient = unpack<Element>(dact.words[word], j);
          act[j] = gated * other;
          if constexpr (kDropout) {
            const bool keep = keeps >> (2 * word + j) & 1;
            act[j] = keep ? act[j] * params.dropout_scale : 0.0f;
            gradient = keep ? gradient * params.dropout_scale : 0.0f;
          }
          dup[j] = gradient * gated;
          dgate[j] = gradient * other * slope;
        }
        dact.words[word] = pack<Element>(dgate[0], dgate[1]);
        gate.words[word] = pack<Element>(act[0], act[1]);
        up.words[word] = pack<Element>(dup[0], dup[1]);
      }
      copy_16(place(params.dact, row), &dact);
      copy_16(place(params.act, row), &gate);
      copy_16(place(params.dup, row), &up);
    }
  });
}

}  // namespace fuseformer
