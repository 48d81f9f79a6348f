// Starts the attention kernels of one dtype: what a translation unit of them defines.
#pragma once

#include "../device/launch.h"
#include "backward_kernel.h"
#include "backward_wide_kernel.h"
#include "entry.h"
#include "forward_kernel.h"
#include "row_kernels.h"

namespace fuseformer {

template <typename Traits, bool kDropout>
const char* launch_forward(const AttentionParams& params, Stream stream) {
  const int64_t blocks = (params.queries + Traits::kBlockM - 1) / Traits::kBlockM;
  return launch_kernel(attention_forward_kernel<Traits, kDropout>,
                       blocks * params.heads * params.batch, Traits::kThreads, Traits::kSharedBytes,
                       stream, params);
}

// The kernel that traits of the backward pass are for.
template <typename Element, int kHeadDim, int kBlockM, int kBlockN, int kStages>
constexpr bool is_wide(BackwardTraits<Element, kHeadDim, kBlockM, kBlockN, kStages>) {
  return false;
}
template <typename Element, int kHeadDim, int kBlockM, int kBlockN, int kKeptSteps>
constexpr bool is_wide(WideBackwardTraits<Element, kHeadDim, kBlockM, kBlockN, kKeptSteps>) {
  return true;
}
template <typename Traits, bool kDropout>
auto* backward_kernel() {
  if constexpr (is_wide(Traits())) {
    return attention_backward_wide_kernel<Traits, kDropout>;
  } else {
    return attention_backward_kernel<Traits, kDropout>;
  }
}

template <typename Traits, bool kDropout>
const char* launch_backward(const AttentionGradientParams& given, Stream stream) {
  const AttentionParams& params = given.forward;
  const int64_t steps = (params.queries + Traits::kBlockM - 1) / Traits::kBlockM;
  const int64_t blocks = (params.keys + Traits::kBlockN - 1) / Traits::kBlockN;
  const char* failure =
      launch_kernel(attention_delta_kernel<Traits>, steps * params.heads * params.batch,
                    kRowThreads, 0, stream, given);
  if (failure == nullptr) {
    failure = launch_kernel(backward_kernel<Traits, kDropout>(),
                            blocks * (params.heads / params.group) * params.batch, Traits::kThreads,
                            Traits::kSharedBytes, stream, given);
  }
  if (failure == nullptr) {
    failure = launch_kernel(attention_finish_kernel<Traits>, steps * params.heads * params.batch,
                            Traits::kThreads, 0, stream, given);
  }
  return failure;
}

template <typename Element, int kHeadDim>
const char* forward_of(const AttentionParams& params, Stream stream) {
  using Traits = ForwardConfig<Element, kHeadDim>;
  return params.seed ? launch_forward<Traits, true>(params, stream)
                     : launch_forward<Traits, false>(params, stream);
}

// Calls `launch` with the backward traits of the current device, as a value of their type.
template <typename Element, int kHeadDim, typename Function>
auto with_backward_traits(Function&& launch) {
  using Large = BackwardConfig<Element, kHeadDim>;
  if constexpr (Large::kSharedBytes > kLeastShared) {
    using Small = SmallBackwardConfig<Element, kHeadDim>;
    static_assert(Small::kSharedBytes <= kLeastShared);
    if (shared_limit() < Large::kSharedBytes) return launch(Small());
  }
  return launch(Large());
}

template <typename Element, int kHeadDim>
const char* backward_of(const AttentionGradientParams& given, Stream stream) {
  return with_backward_traits<Element, kHeadDim>([&](auto traits) {
    using Traits = decltype(traits);
    return given.forward.seed ? launch_backward<Traits, true>(given, stream)
                              : launch_backward<Traits, false>(given, stream);
  });
}

// The list of what is instantiated. Returns null, or why nothing was started.
template <typename Element>
const char* attention_forward(const AttentionParams& params, int head_dim, Stream stream) {
  switch (head_dim) {
    case 32:
      return forward_of<Element, 32>(params, stream);
    case 64:
      return forward_of<Element, 64>(params, stream);
    case 96:
      return forward_of<Element, 96>(params, stream);
    case 128:
      return forward_of<Element, 128>(params, stream);
    case 256:
      return forward_of<Element, 256>(params, stream);
    default:
      return "no forward kernel of this head dim";
  }
}

// The queries of a step of the backward pass, of which workspaces hold whole ones; 0 if there is
// none.
template <typename Element>
int backward_step_rows(int head_dim) {
  const auto rows = [](auto traits) { return decltype(traits)::kBlockM; };
  switch (head_dim) {
    case 32:
      return with_backward_traits<Element, 32>(rows);
    case 64:
      return with_backward_traits<Element, 64>(rows);
    case 96:
      return with_backward_traits<Element, 96>(rows);
    case 128:
      return with_backward_traits<Element, 128>(rows);
    case 256:
      return with_backward_traits<Element, 256>(rows);
    default:
      return 0;
  }
}

template <typename Element>
const char* attention_backward(const AttentionGradientParams& given, int head_dim, Stream stream) {
  switch (head_dim) {
    case 32:
      return backward_of<Element, 32>(given, stream);
    case 64:
      return backward_of<Element, 64>(given, stream);
    case 96:
      return backward_of<Element, 96>(given, stream);
    case 128:
      return backward_of<Element, 128>(given, stream);
    case 256:
      return backward_of<Element, 256>(given, stream);
    default:
      return "no backward kernel of this head dim";
  }
}

}  // namespace fuseformer
