// Starts the kernels of the resident regime's backward pass of one dtype.
#pragma once

#include "../device/launch.h"
#include "backward_entry.h"
#include "backward_finish.h"
#include "backward_kernel.h"

namespace fuseformer {

template <typename Traits, typename Kind>
const char* launch_feed_forward_backward(const FeedForwardGradientParams& given, Stream stream) {
  using Element = typename Traits::Element;
  const auto kernel = given.forward.seed != nullptr
                          ? feed_forward_backward_kernel<Traits, Kind, true>
                          : feed_forward_backward_kernel<Traits, Kind, false>;
  const int64_t unit_blocks = (given.forward.hidden + Traits::kBlockH - 1) / Traits::kBlockH;
  const char* failure = launch_kernel(kernel, unit_blocks * given.splits, Traits::kThreads,
                                      Traits::kSharedBytes, stream, given);
  const int64_t steps = (given.forward.tokens + Traits::kBlockM - 1) / Traits::kBlockM;
  if (failure == nullptr) {
    failure = launch_kernel(feed_forward_finish_tokens_kernel<Traits>, steps, Traits::kThreads, 0,
                            stream, given);
  }
  if (failure == nullptr) {
    const int64_t eights = int64_t{given.forward.hidden} / 8 * (2 * Traits::kWidth + 1);
    failure = launch_kernel(feed_forward_finish_weights_kernel<Element, Traits::kWidth>,
                            (eights + kFinishThreads - 1) / kFinishThreads, kFinishThreads, 0,
                            stream, given);
  }
  return failure;
}

// Others than relu are bound by their arithmetic: one kernel has them all.
template <typename Traits>
const char* feed_forward_backward_of(const FeedForwardGradientParams& given, Stream stream) {
  using Relu = ActivationConstant<Activation::kRelu>;
  return given.activation == Activation::kRelu
             ? launch_feed_forward_backward<Traits, Relu>(given, stream)
             : launch_feed_forward_backward<Traits, SmoothActivation>(given, stream);
}

// Calls `launch` with the traits of the current device, as a value of their type.
template <typename Element, int kWidth, typename Function>
auto with_backward_traits(const Function& launch) {
  using Large = FeedForwardBackwardConfig<Element, kWidth>;
  if constexpr (Large::kSharedBytes > kBackwardLeastShared) {
    using Small = SmallFeedForwardBackwardConfig<Element, kWidth>;
    static_assert(Small::kSharedBytes <= kBackwardLeastShared);
    if (shared_limit() < Large::kSharedBytes) return launch(Small());
  }
  return launch(Large());
}

// The list of what is instantiated: `launch` as above, or `none` for another width.
template <typename Element, typename Function, typename Result>
Result with_backward_traits_of(int width, const Function& launch, Result none) {
  switch (width) {
    case 64:
      return with_backward_traits<Element, 64>(launch);
    case 128:
      return with_backward_traits<Element, 128>(launch);
    case 256:
      return with_backward_traits<Element, 256>(launch);
    default:
      return none;
  }
}

template <typename Element>
const char* feed_forward_backward(const FeedForwardGradientParams& given, int width,
                                  Stream stream) {
  return with_backward_traits_of<Element>(
      width, [&](auto traits) { return feed_forward_backward_of<decltype(traits)>(given, stream); },
      "no backward kernel of this width");
}

template <typename Element>
FeedForwardBackwardSizes feed_forward_backward_sizes(int width) {
  return with_backward_traits_of<Element>(
      width,
      [](auto traits) {
        using Traits = decltype(traits);
        return FeedForwardBackwardSizes{Traits::kBlockM, Traits::kBlockH};
      },
      FeedForwardBackwardSizes{0, 0});
}

}  // namespace fuseformer
