#include "backward.h"

#include "backward_entry.h"
#include "checks.h"

namespace fuseformer {

namespace {

FeedForwardBackwardSizes sizes_of(int64_t width, DType dtype) {
  if (width > kMost) return {0, 0};
  const int columns = static_cast<int>(width);
  if (dtype == DType::kBfloat16) return feed_forward_backward_sizes<Bfloat16>(columns);
  if (dtype == DType::kFloat16) return feed_forward_backward_sizes<Half>(columns);
  return {0, 0};
}

void* contiguous(const TensorView& x, const TensorView& like, DType dtype,
                 const std::vector<int64_t>& sizes) {
  require_shape(x, sizes);
  require_dtype(x, dtype);
  require_device(x, like);
  require_contiguous(x);
  return x.data;
}

}  // namespace

void run_feed_forward_backward(const FeedForwardGradientArguments& a, Stream stream) {
  FeedForwardGradientParams given = {};
  FeedForwardParams& params = given.forward;
  given.activation = activation_of(a.activation);
  require_matrix(a.x);
  require_matrix(a.w1);
  const int64_t tokens = a.x.sizes[0], width = a.x.sizes[1], hidden = a.w1.sizes[0];
  if (hidden % 8 != 0) {
    refuse(a.w1, std::to_string(hidden) + " hidden units", "a multiple of 8");
  }
  const int64_t step_tokens = sizes_of(width, a.x.dtype).step_tokens;
  if (step_tokens == 0) refuse(a.x, std::to_string(width) + " columns", "64, 128 or 256");
  params.tokens = static_cast<int>(tokens);
  params.hidden = static_cast<int>(hidden);
  params.x = matrix(a.x, a.x, {tokens, width});
  params.w1 = matrix(a.w1, a.x, {hidden, width}).data;
  require_contiguous(a.w1);
  params.w2 = matrix(a.w2, a.x, {width, hidden});
  params.b1 = bias(a.b1, a.x, hidden);
  give_dropout(params, a, a.x);
  given.dy = matrix(a.dy, a.x, {tokens, width});
  given.dx = matrix(a.dx, a.x, {tokens, width});
  given.dw1 = matrix(a.dw1, a.x, {hidden, width}).data;
  require_contiguous(a.dw1);
  given.dw2 = matrix(a.dw2, a.x, {width, hidden}).data;
  require_contiguous(a.dw2);
  given.db1 = const_cast<void*>(bias(a.db1, a.x, hidden));

  const int64_t steps = (tokens + step_tokens - 1) / step_tokens;
  if (a.weight_sums.sizes.size() != 4 || a.weight_sums.sizes[0] < 1 ||
      a.weight_sums.sizes[0] > kMost) {
    refuse(a.weight_sums, "shape " + shape_text(a.weight_sums.sizes),
           "4 dimensions, the first at least 1 and at most 2^29");
  }
  const int64_t splits = a.weight_sums.sizes[0];
  const DType wide = DType::kFloat32;
  given.splits = static_cast<int>(splits);
  given.weight_sums =
      static_cast<float*>(contiguous(a.weight_sums, a.x, wide, {splits, 2, hidden, width}));
  given.bias_sums = static_cast<float*>(contiguous(a.bias_sums, a.x, wide, {splits, hidden}));
  if (a.dx_sums.sizes.size() != 4 || a.dx_sums.sizes[0] < 1 || a.dx_sums.sizes[0] > kMost) {
    refuse(a.dx_sums, "shape " + shape_text(a.dx_sums.sizes),
           "4 dimensions, the first at least 1 and at most 2^29");
  }
  const int64_t parts = a.dx_sums.sizes[0];
  if (parts * steps > kMost) {
    refuse(a.dx_sums, std::to_string(parts) + " parts", "at most 2^29 steps in all of them");
  }
  given.dx_parts = static_cast<int>(parts);
  given.dx_sums =
      static_cast<float*>(contiguous(a.dx_sums, a.x, wide, {parts, steps, step_tokens, width}));
  given.turns = static_cast<int*>(contiguous(a.turns, a.x, DType::kInt32, {parts, steps}));
  const int columns = static_cast<int>(width);
  check_launch("feed_forward", a.x.dtype == DType::kBfloat16
                                   ? feed_forward_backward<Bfloat16>(given, columns, stream)
                                   : feed_forward_backward<Half>(given, columns, stream));
}

int64_t feed_forward_step_tokens(int64_t width, DType dtype) {
  return sizes_of(width, dtype).step_tokens;
}

int64_t feed_forward_block_units(int64_t width, DType dtype) {
  return sizes_of(width, dtype).block_units;
}

}  // namespace fuseformer
