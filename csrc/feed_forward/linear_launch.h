// Starts the kernels of the epilogue regime of one dtype.
#pragma once

#include "../device/launch.h"
#include "gradient_kernel.h"
#include "linear_entry.h"
#include "linear_kernel.h"

namespace fuseformer {

template <typename Traits>
const char* launch_linear(const LinearParams& params, Stream stream) {
  const int64_t row_blocks = (params.tokens + Traits::kBlockM - 1) / Traits::kBlockM;
  const int64_t unit_blocks = (params.hidden + Traits::kUnits - 1) / Traits::kUnits;
  const auto kernel =
      params.seed != nullptr ? linear_kernel<Traits, true> : linear_kernel<Traits, false>;
  return launch_kernel(kernel, row_blocks * unit_blocks, Traits::kThreads, Traits::kSharedBytes,
                       stream, params);
}

template <typename Element>
const char* linear_activation(const LinearParams& params, Stream stream) {
  return launch_linear<LinearTraits<Element>>(params, stream);
}

template <typename Element>
const char* activation_gradient(const ActivationGradientParams& params, Stream stream) {
  const int64_t row_blocks = (params.tokens + kGradientRows - 1) / kGradientRows;
  const int64_t unit_blocks = (params.hidden + kGradientUnits - 1) / kGradientUnits;
  const auto kernel = params.seed != nullptr ? activation_gradient_kernel<Element, true>
                                             : activation_gradient_kernel<Element, false>;
  return launch_kernel(kernel, row_blocks * unit_blocks, kGradientThreads, kGradientSharedBytes,
                       stream, params);
}

}  // namespace fuseformer
