// Starts the feed-forward kernels of one dtype: what a translation unit of them defines.
#pragma once

#include "../device/launch.h"
#include "entry.h"
#include "forward_kernel.h"

namespace fuseformer {

template <typename Traits, Activation kActivation>
const char* launch_feed_forward(const FeedForwardParams& params, Stream stream) {
  const auto kernel = params.seed ? feed_forward_forward_kernel<Traits, kActivation, true>
                                  : feed_forward_forward_kernel<Traits, kActivation, false>;
  const int64_t blocks = (int64_t{params.tokens} + Traits::kBlockM - 1) / Traits::kBlockM;
  return launch_kernel(kernel, blocks, Traits::kThreads, Traits::kSharedBytes, stream, params);
}

template <typename Element, int kWidth>
const char* feed_forward_of(const FeedForwardParams& params, Activation activation, Stream stream) {
  using Traits = FeedForwardConfig<Element, kWidth>;
  switch (activation) {
    case Activation::kRelu:
      return launch_feed_forward<Traits, Activation::kRelu>(params, stream);
    case Activation::kGelu:
      return launch_feed_forward<Traits, Activation::kGelu>(params, stream);
    case Activation::kGeluTanh:
      return launch_feed_forward<Traits, Activation::kGeluTanh>(params, stream);
    case Activation::kSilu:
      return launch_feed_forward<Traits, Activation::kSilu>(params, stream);
  }
  return "no such activation";
}

// The list of what is instantiated.
template <typename Element>
const char* feed_forward_forward(const FeedForwardParams& params, int width, Activation activation,
                                 Stream stream) {
  switch (width) {
    case 64:
      return feed_forward_of<Element, 64>(params, activation, stream);
    case 128:
      return feed_forward_of<Element, 128>(params, activation, stream);
    case 256:
      return feed_forward_of<Element, 256>(params, activation, stream);
    default:
      return "no forward kernel of this width";
  }
}

}  // namespace fuseformer
