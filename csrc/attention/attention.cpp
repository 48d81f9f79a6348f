#include "attention.h"

#include "checks.h"
#include "entry.h"

namespace fuseformer {
namespace {

AttentionParams params_of(const AttentionArguments& a) {
  const bool packed = a.cu_seqlens_q.given;
  const int64_t dims = require_dims(a.q, packed ? 3 : 4);
  require_dims(a.k, dims);
  if (a.q.dtype != DType::kBfloat16 && a.q.dtype != DType::kFloat16) {
    refuse(a.q, name_of(a.q.dtype), "bfloat16 or float16");
  }
  const int64_t rows_dim = packed ? 0 : 2;
  const int64_t heads = a.q.sizes[1], kv_heads = a.k.sizes[1];
  if (kv_heads == 0 || heads % kv_heads != 0) {
    refuse(a.k, std::to_string(kv_heads) + " heads",
           "a divisor of q's " + std::to_string(heads) + " heads");
  }
  std::vector<int64_t> k_sizes = a.q.sizes;
  k_sizes[1] = kv_heads;
  k_sizes[rows_dim] = a.k.sizes[rows_dim];

  AttentionParams params = {};
  params.q = head_tensor(a.q, a.q, a.q.sizes);
  params.k = head_tensor(a.k, a.q, k_sizes);
  params.v = head_tensor(a.v, a.q, k_sizes);
  params.out = head_tensor(a.out, a.q, a.q.sizes);
  const int64_t rows = a.q.sizes[rows_dim], keys = a.k.sizes[rows_dim];
  within("q's rows", rows, 0, kMostRows);
  within("k's rows", keys, 0, kMostRows);
  std::vector<int64_t> lse_sizes = {heads, rows};
  if (!packed) lse_sizes.insert(lse_sizes.begin(), a.q.sizes[0]);
  params.lse = workspace(a.lse, a.q, lse_sizes);
  params.lse_batch_stride = packed ? 0 : heads * rows;
  params.lse_head_stride = rows;

  params.heads = within("q's heads", heads, 0, std::numeric_limits<int>::max());
  params.group = static_cast<int>(heads / kv_heads);
  if (packed) {
    require_dims(a.cu_seqlens_q, 1);
    const int64_t count = a.cu_seqlens_q.sizes[0];
    params.batch = within("sequences", count - 1, 0, std::numeric_limits<int>::max());
    params.queries = within("max_seqlen_q", a.max_seqlen_q, 0, kMostRows);
    params.keys = within("max_seqlen_k", a.max_seqlen_k, 0, kMostRows);
    params.cu_seqlens_q = offsets(a.cu_seqlens_q, a.q, count);
    params.cu_seqlens_k = offsets(a.cu_seqlens_k, a.q, count);
  } else {
    params.batch = within("q's batch", a.q.sizes[0], 0, std::numeric_limits<int>::max());
    params.queries = static_cast<int>(rows);
    params.keys = static_cast<int>(keys);
    if (a.key_lengths.given) params.key_lengths = offsets(a.key_lengths, a.q, params.batch);
  }
  params.window_left = window_side("window_left", a.window_left);
  params.window_right = window_side("window_right", a.window_right);
  params.bottom_right = a.bottom_right;
  params.scale = positive_scale(a.scale);
  params.scale_log2 = params.scale * 1.44269504f;
  if (a.seed.given) {
    require_dtype(a.seed, DType::kInt64);
    require_device(a.seed, a.q);
    if (a.seed.numel() != 1) refuse(a.seed, "shape " + shape_text(a.seed.sizes), "one number");
    params.seed = static_cast<const int64_t*>(a.seed.data);
    params.dropout_threshold =
        static_cast<uint32_t>(within("dropout_threshold", a.dropout_threshold, 0, 1 << 16));
    params.dropout_scale = static_cast<float>(a.dropout_scale);
  }
  return params;
}

int head_dim_of(const AttentionArguments& a) { return static_cast<int>(a.q.sizes.back()); }

}  // namespace

void run_attention_forward(const AttentionArguments& a, Stream stream) {
  const AttentionParams params = params_of(a);
  check_launch("attention", a.q.dtype == DType::kBfloat16
                                ? attention_forward<Bfloat16>(params, head_dim_of(a), stream)
                                : attention_forward<Half>(params, head_dim_of(a), stream));
}

int attention_step_rows(int64_t head_dim, DType dtype) {
  const int dim = within("head_dim", head_dim, 0, 1 << 16);
  return dtype == DType::kBfloat16 ? backward_step_rows<Bfloat16>(dim)
                                   : backward_step_rows<Half>(dim);
}

void run_attention_backward(const AttentionGradientArguments& a, Stream stream) {
  AttentionGradientParams given = {};
  given.forward = params_of(a);
  given.dout = head_tensor(a.dout, a.q, a.q.sizes);
  given.dq = head_tensor(a.dq, a.q, a.q.sizes);
  given.dk = head_tensor(a.dk, a.q, a.k.sizes);
  given.dv = head_tensor(a.dv, a.q, a.k.sizes);
  if (a.dlse.given) given.dlse = workspace(a.dlse, a.q, a.lse.sizes);

  const int head_dim = head_dim_of(a), step = attention_step_rows(head_dim, a.q.dtype);
  if (step == 0) {
    refuse(a.q, "head dim " + std::to_string(head_dim), "one with a backward kernel");
  }
  const AttentionParams& params = given.forward;
  const int64_t sequence_rows = (params.queries + int64_t{step} - 1) / step * step;
  const int64_t rows = params.cu_seqlens_q != nullptr ? (a.q.sizes[0] / step + params.batch) * step
                                                      : params.batch * sequence_rows;
  within("rows of the workspaces", rows, 0, std::numeric_limits<int>::max());
  // A visit of the backward kernel is one number (`backward_order.h`).
  within("query heads of a key head", params.group, 1, kMostMembers);
  within("tiles of queries", sequence_rows / step, 0, kMostTiles - 1);
  given.workspace_rows = static_cast<int>(rows);
  given.lse_log2 = workspace(a.lse_log2, a.q, {params.heads, rows});
  given.delta = workspace(a.delta, a.q, {params.heads, rows});
  given.dq_sums = workspace(a.dq_sums, a.q, {params.heads, rows, head_dim});
  if (a.dq_turns.given) {
    require_dtype(a.dq_turns, DType::kInt32);
    require_device(a.dq_turns, a.q);
    require_shape(a.dq_turns, {params.heads, rows / step});
    require_contiguous(a.dq_turns);
    given.dq_turns = static_cast<int*>(a.dq_turns.data);
  }
  check_launch("attention", a.q.dtype == DType::kBfloat16
                                ? attention_backward<Bfloat16>(given, head_dim, stream)
                                : attention_backward<Half>(given, head_dim, stream));
}

}  // namespace fuseformer
