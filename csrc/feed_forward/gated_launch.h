// Starts the kernels of gated blocks of one dtype.
#pragma once

#include "gated_entry.h"
#include "gated_gradient_kernel.h"
#include "linear_launch.h"

namespace fuseformer {

template <typename Element>
const char* gated_activation(const LinearParams& params, Stream stream) {
  return launch_linear<LinearTraits<Element, 2>>(params, stream);
}

template <typename Element>
const char* gated_gradient(const GatedGradientParams& params, Stream stream) {
  const int64_t row_blocks = (params.tokens + kGatedRows - 1) / kGatedRows;
  const int64_t unit_blocks = (params.hidden + kGatedUnits - 1) / kGatedUnits;
  constexpr int kShared = kGatedRows * kGatedUnits / 8;
  const bool drops = params.seed != nullptr;
  const auto kernel =
      drops ? gated_gradient_kernel<Element, true> : gated_gradient_kernel<Element, false>;
  return launch_kernel(kernel, row_blocks * unit_blocks, 32 * kGatedWarps, drops ? kShared : 0,
                       stream, params);
}

}  // namespace fuseformer
