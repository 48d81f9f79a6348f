// What the translation units of the epilogue regime offer the host.
#pragma once

#include "../device/stream.h"
#include "linear_params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Start the kernel of one dtype. Return null, or why nothing was started.
template <typename Element>
const char* linear_activation(const LinearParams& params, Stream stream);
template <typename Element>
const char* activation_gradient(const ActivationGradientParams& params, Stream stream);

}  // namespace fuseformer
