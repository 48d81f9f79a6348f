// What the translation units of gated blocks offer the host.
#pragma once

#include "../device/stream.h"
#include "gated_params.h"
#include "linear_params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Start the kernel of one dtype. Return null, or why nothing was started.
template <typename Element>
const char* gated_activation(const LinearParams& params, Stream stream);
template <typename Element>
const char* gated_gradient(const GatedGradientParams& params, Stream stream);

}  // namespace fuseformer
