#include "feed_forward.h"

#include "checks.h"
#include "entry.h"

namespace fuseformer {

void run_feed_forward_forward(const FeedForwardArguments& a, Stream stream) {
  const Activation activation = activation_of(a.activation);
  require_matrix(a.x);
  require_matrix(a.w1);
  const int64_t tokens = a.x.sizes[0], width = a.x.sizes[1], hidden = a.w1.sizes[0];
  if (hidden % 8 != 0) {
    refuse(a.w1, std::to_string(hidden) + " hidden units", "a multiple of 8");
  }
  FeedForwardParams params = {};
  params.tokens = static_cast<int>(tokens);
  params.hidden = static_cast<int>(hidden);
  params.x = matrix(a.x, a.x, {tokens, width});
  params.w1 = matrix(a.w1, a.x, {hidden, width}).data;
  require_contiguous(a.w1);
  params.w2 = matrix(a.w2, a.x, {width, hidden});
  params.y = matrix(a.y, a.x, {tokens, width});
  params.b1 = bias(a.b1, a.x, hidden);
  params.b2 = bias(a.b2, a.x, width);
  give_dropout(params, a, a.x);
  const int columns = static_cast<int>(width);
  check_launch("feed_forward",
               a.x.dtype == DType::kBfloat16
                   ? feed_forward_forward<Bfloat16>(params, columns, activation, stream)
                   : feed_forward_forward<Half>(params, columns, activation, stream));
}

}  // namespace fuseformer
