// Starts the decode kernels of one dtype.
#pragma once

#include "../device/launch.h"
#include "decode_entry.h"
#include "decode_kernel.h"

namespace fuseformer {

template <typename Traits>
const char* launch_decode(const DecodeParams& params, Stream stream) {
  const int64_t row_blocks =
      (static_cast<int64_t>(params.group) * params.queries + Traits::kRows - 1) / Traits::kRows;
  const int64_t blocks = row_blocks * params.splits * (params.heads / params.group) * params.batch;
  const char* failure = launch_kernel(attention_decode_kernel<Traits>, blocks, Traits::kThreads,
                                      Traits::kSharedBytes, stream, params);
  if (failure != nullptr || params.splits == 1) return failure;
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.queries;
  return launch_kernel(attention_merge_kernel<Traits>, (rows + kMergeRows - 1) / kMergeRows,
                       32 * kMergeRows, 0, stream, params);
}

// The list of what is instantiated. Returns null, or why nothing was started.
template <typename Element>
const char* attention_decode(const DecodeParams& params, int head_dim, Stream stream) {
  switch (head_dim) {
    case 32:
      return launch_decode<DecodeTraits<Element, 32>>(params, stream);
    case 64:
      return launch_decode<DecodeTraits<Element, 64>>(params, stream);
    case 96:
      return launch_decode<DecodeTraits<Element, 96>>(params, stream);
    case 128:
      return launch_decode<DecodeTraits<Element, 128>>(params, stream);
    case 256:
      return launch_decode<DecodeTraits<Element, 256>>(params, stream);
    default:
      return "no decode kernel of this head dim";
  }
}

}  // namespace fuseformer
