// What a launch of a feed-forward block is told; plain data, the same on the host, on the GPU and
// emulated.
#pragma once

#include <cstdint>

namespace fuseformer {

enum class Activation { kRelu, kGelu, kGeluTanh, kSilu };

// A matrix of 16-bit numbers whose rows are contiguous; the stride in elements.
struct RowTensor {
  void* data;
  int64_t row_stride;
};

struct FeedForwardParams {
  RowTensor x;     // (tokens, width)
  const void* w1;  // (hidden, width), contiguous
  RowTensor w2;    // (width, hidden)
  RowTensor y;     // like x
  const void* b1;  // (hidden,), or null
  const void* b2;  // (width,), or null

  int tokens;
  int hidden;  // a multiple of 8

  const int64_t* seed;  // of dropout, on the device: a captured graph may change it
  uint32_t dropout_threshold;
  float dropout_scale;
};

}  // namespace fuseformer
