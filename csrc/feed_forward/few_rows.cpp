#include "few_rows.h"

#include "checks.h"
#include "few_rows_entry.h"
#include "few_rows_traits.h"

namespace fuseformer {
namespace {

using Tiles = FewRowsTraits<void>;

// What both products take: the rows, the weights and what becomes of them.
FewRowsParams product(const TensorView& x, const TensorView& w, const TensorView& bias_of_w,
                      const TensorView& out) {
  require_matrix(x);
  require_matrix(w);
  require_matrix(out);
  const int64_t tokens = x.sizes[0], columns = x.sizes[1], units = w.sizes[0];
  if (tokens > Tiles::kRows) {
    refuse(x, std::to_string(tokens) + " rows", "at most " + std::to_string(Tiles::kRows));
  }
  FewRowsParams params = {};
  params.x = matrix(x, x, {tokens, columns});
  params.w = matrix(w, x, {units, columns});
  params.out = matrix(out, x, {tokens, units});
  params.bias = bias(bias_of_w, x, units);
  params.tokens = static_cast<int>(tokens);
  params.columns = static_cast<int>(columns);
  params.units = static_cast<int>(units);
  params.splits = 1;
  params.split_columns = params.columns;
  return params;
}

}  // namespace

void run_few_rows_hidden(const FewRowsHiddenArguments& a, Stream stream) {
  FewRowsParams params = product(a.x, a.w1, a.b1, a.act);
  const std::vector<int64_t>& sizes = a.act.sizes;
  if (a.pre.given) params.pre = matrix(a.pre, a.x, sizes);
  if (a.w_up.given) params.w_up = matrix(a.w_up, a.x, a.w1.sizes);
  if (a.up.given) {
    if (!a.w_up.given) refuse(a.up, "a tensor", "None without w_up");
    params.up = matrix(a.up, a.x, sizes);
  }
  give_dropout(params, a, a.x);
  params.activation = activation_of(a.activation);
  check_launch("feed_forward", a.x.dtype == DType::kBfloat16
                                   ? few_rows_hidden<Bfloat16>(params, stream)
                                   : few_rows_hidden<Half>(params, stream));
}

void run_few_rows_output(const FewRowsOutputArguments& a, Stream stream) {
  FewRowsParams params = product(a.act, a.w2, a.b2, a.y);
  if (a.partial.given) {
    const int64_t splits = a.partial.sizes.empty() ? 0 : a.partial.sizes[0];
    require_dtype(a.partial, DType::kFloat32);
    require_device(a.partial, a.act);
    require_shape(a.partial, {splits, params.tokens, params.units});
    require_contiguous(a.partial);
    if (splits < 1 || splits > 1 << 16) {
      refuse(a.partial, std::to_string(splits) + " parts", "1 to 65536");
    }
    const int64_t chunks = (int64_t{params.columns} + Tiles::kChunk - 1) / Tiles::kChunk;
    params.splits = static_cast<int>(splits);
    params.split_columns = static_cast<int>((chunks + splits - 1) / splits * Tiles::kChunk);
    params.partial = static_cast<float*>(a.partial.data);
  }
  check_launch("feed_forward", a.act.dtype == DType::kBfloat16
                                   ? few_rows_output<Bfloat16>(params, stream)
                                   : few_rows_output<Half>(params, stream));
}

}  // namespace fuseformer
