// The block of keys that a block of a backward kernel owns.
#pragma once

#include "mask.h"

namespace fuseformer {

struct KeyBlock {
  int batch;
  int kv_head;
  int key;  // the first one, in its sequence
  Sequence sequence;

  // Row 0 of a tensor for `head`, `first_row` rows into it.
  FUSEFORMER_DEVICE char* rows_of(const HeadTensor& tensor, int head, int first_row) const {
    return static_cast<char*>(tensor.data) +
           2 * (batch * tensor.batch_stride + head * tensor.head_stride +
                first_row * tensor.row_stride);
  }
};

// Of a grid of (key blocks * key heads * batch,), key blocks fastest. It is computed again at each
// call: registers are needed for sums meanwhile.
template <int kBlockN>
FUSEFORMER_DEVICE KeyBlock key_block(const AttentionParams& params) {
  uint32_t index = blockIdx.x, keys = params.keys, heads = params.heads;
  compute_again(index);
  compute_again(keys);
  compute_again(heads);
  const uint32_t kv_heads = heads / params.group;
  const uint32_t blocks = (keys + kBlockN - 1) / kBlockN;
  KeyBlock block;
  block.batch = index / (blocks * kv_heads);
  block.kv_head = index / blocks % kv_heads;
  block.key = index % blocks * kBlockN;
  block.sequence = sequence_of(params, block.batch);
  return block;
}

}  // namespace fuseformer
