// What the translation units of feed-forward blocks offer the host: one for each dtype.
#pragma once

#include "../device/stream.h"
#include "params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Starts the forward pass of one dtype. Returns null, or why nothing was started.
template <typename Element>
const char* feed_forward_forward(const FeedForwardParams& params, int width, Activation activation,
                                 Stream stream);

}  // namespace fuseformer
