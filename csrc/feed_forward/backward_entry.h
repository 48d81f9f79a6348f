// What the translation units of the resident regime's backward pass offer the host.
#pragma once

#include "../device/stream.h"
#include "backward_params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Starts the backward pass of one dtype. Returns null, or why nothing was started.
template <typename Element>
const char* feed_forward_backward(const FeedForwardGradientParams& given, int width, Stream stream);

// What the sizes of workspaces follow from, and how many blocks there are for a split.
struct FeedForwardBackwardSizes {
  int step_tokens;
  int block_units;
};

// On the current device; zeros where there is no kernel of this width.
template <typename Element>
FeedForwardBackwardSizes feed_forward_backward_sizes(int width);

}  // namespace fuseformer
