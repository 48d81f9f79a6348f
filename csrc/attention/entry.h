// What the translation units of attention offer the host: one for each dtype and pass.
#pragma once

#include "../device/stream.h"
#include "params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Start the pass of one dtype. Return null, or why nothing was started.
template <typename Element>
const char* attention_forward(const AttentionParams& params, int head_dim, Stream stream);
template <typename Element>
const char* attention_backward(const AttentionGradientParams& given, int head_dim, Stream stream);

// The queries of a step of the backward pass on the current device, of which workspaces hold whole
// ones; 0 if there is none of this head dim.
template <typename Element>
int backward_step_rows(int head_dim);

}  // namespace fuseformer
