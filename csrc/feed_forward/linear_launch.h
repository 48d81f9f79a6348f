// Starts the kernels of the epilogue regime of one dtype.
#pragma once

#include "../device/launch.h"
#include "gradient_kernel.h"
#include "linear_entry.h"
#include "linear_kernel.h"

namespace fuseformer {

// Calls `launch` with the activation as a constant: the list of what is instantiated.
template <typename Function>
const char* with_activation(Activation activation, Function&& launch) {
  switch (activation) {
    case Activation::kRelu:
      return launch(ActivationConstant<Activation::kRelu>());
    case Activation::kGelu:
      return launch(ActivationConstant<Activation::kGelu>());
    case Activation::kGeluTanh:
      return launch(ActivationConstant<Activation::kGeluTanh>());
    default:
      return launch(ActivationConstant<Activation::kSilu>());
  }
}

template <typename Element>
const char* linear_activation(const LinearParams& params, Activation activation, Stream stream) {
  using Traits = LinearTraits<Element>;
  const int64_t row_blocks = (params.tokens + Traits::kBlockM - 1) / Traits::kBlockM;
  const int64_t unit_blocks = (params.hidden + Traits::kBlockN - 1) / Traits::kBlockN;
  return with_activation(activation, [&](auto kind) {
    constexpr Activation kKind = decltype(kind)::value;
    const auto kernel = params.seed != nullptr ? linear_kernel<Traits, kKind, true>
                                               : linear_kernel<Traits, kKind, false>;
    return launch_kernel(kernel, row_blocks * unit_blocks, Traits::kThreads, Traits::kSharedBytes,
                         stream, params);
  });
}

template <typename Element>
const char* activation_gradient(const ActivationGradientParams& params, Activation activation,
                                Stream stream) {
  const int64_t row_blocks = (params.tokens + kGradientRows - 1) / kGradientRows;
  const int64_t unit_blocks = (params.hidden + kGradientUnits - 1) / kGradientUnits;
  constexpr int kShared = kGradientThreads / (kGradientUnits / 8) * kGradientUnits * 4;
  return with_activation(activation, [&](auto kind) {
    constexpr Activation kKind = decltype(kind)::value;
    const auto kernel = params.seed != nullptr ? activation_gradient_kernel<Element, kKind, true>
                                               : activation_gradient_kernel<Element, kKind, false>;
    return launch_kernel(kernel, row_blocks * unit_blocks, kGradientThreads, kShared, stream,
                         params);
  });
}

}  // namespace fuseformer
