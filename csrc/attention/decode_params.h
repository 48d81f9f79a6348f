// What a launch of decoding is told.
#pragma once

#include "../device/element.h"
#include "params.h"

namespace fuseformer {

struct DecodeParams {
  HeadTensor q;    // (batch, heads, queries, head_dim)
  HeadTensor k;    // (batch, heads / group, capacity, head_dim), or (pages, ..., page_size, ...)
  HeadTensor v;    // like k
  HeadTensor out;  // like q
  float* lse;      // (batch, heads, queries)

  const int* lengths;      // (batch,): keys of each sequence, the new ones among them
  const int* block_table;  // null, or (batch, pages of a sequence)
  int64_t table_stride;

  int batch;
  int heads;
  int group;  // query heads that share a key head
  int queries;
  int capacity;  // keys that the cache holds of a sequence
  int pages;
  int page_size;
  // Query i sees the keys from i + diagonal - window_left to i + diagonal + window_right, the last
  // query being aligned with the last key. A causal mask is a right window of 0, kNoWindow hides
  // nothing.
  int window_left;
  int window_right;
  float scale;  // of the products, positive

  int splits;
  float* partial_out;  // (batch, heads, queries, splits, head_dim) of more than one split
  float* partial_lse;  // (batch, heads, queries, splits), in units of exp2
};

constexpr int kMergeRows = 4;

// Writes two neighbouring numbers of the output.
template <typename Element>
FUSEFORMER_DEVICE void write_decoded(const DecodeParams& params, int batch, int head, int query,
                                     int column, float low, float high) {
  Element* row = static_cast<Element*>(params.out.data) + batch * params.out.batch_stride +
                 head * params.out.head_stride + query * params.out.row_stride;
  *reinterpret_cast<uint32_t*>(row + column) = pack<Element>(low, high);
}

}  // namespace fuseformer
