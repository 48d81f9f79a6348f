#include "decode.h"

#include "checks.h"
#include "decode_entry.h"
#include "decode_params.h"

namespace fuseformer {

void run_decode(const DecodeArguments& a, Stream stream) {
  require_dims(a.q, 4);
  require_dims(a.k_cache, 4);
  if (a.q.dtype != DType::kBfloat16 && a.q.dtype != DType::kFloat16) {
    refuse(a.q, name_of(a.q.dtype), "bfloat16 or float16");
  }
  const int64_t batch = a.q.sizes[0], heads = a.q.sizes[1], queries = a.q.sizes[2];
  const int64_t head_dim = a.q.sizes[3], kv_heads = a.k_cache.sizes[1];
  if (kv_heads == 0 || heads % kv_heads != 0) {
    refuse(a.k_cache, std::to_string(kv_heads) + " heads",
           "a divisor of q's " + std::to_string(heads) + " heads");
  }
  const bool paged = a.block_table.given;
  const std::vector<int64_t> cache_sizes = {paged ? a.k_cache.sizes[0] : batch, kv_heads,
                                            a.k_cache.sizes[2], head_dim};
  DecodeParams params = {};
  params.q = head_tensor(a.q, a.q, a.q.sizes);
  params.k = head_tensor(a.k_cache, a.q, cache_sizes);
  params.v = head_tensor(a.v_cache, a.q, cache_sizes);
  params.out = head_tensor(a.out, a.q, a.q.sizes);
  params.lse = workspace(a.lse, a.q, {batch, heads, queries});
  params.lengths = offsets(a.lengths, a.q, batch);
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  params.batch = within("q's batch", batch, 0, kMost);
  params.heads = within("q's heads", heads, 0, kMost);
  params.group = static_cast<int>(heads / kv_heads);
  params.queries = within("q's rows", queries, 0, 1 << 10);
  int64_t capacity = a.k_cache.sizes[2];
  if (paged) {
    require_dims(a.block_table, 2);
    require_dtype(a.block_table, DType::kInt32);
    require_device(a.block_table, a.q);
    require_shape(a.block_table, {batch, a.block_table.sizes[1]});
    if (a.block_table.sizes[1] > 1 && a.block_table.strides[1] != 1) {
      refuse(a.block_table, "stride " + std::to_string(a.block_table.strides[1]) + " of its pages",
             "1");
    }
    params.block_table = static_cast<const int*>(a.block_table.data);
    params.table_stride = a.block_table.strides[0];
    params.pages = within("k_cache's pages", a.k_cache.sizes[0], 0, kMost);
    params.page_size = static_cast<int>(capacity);
    capacity *= params.pages > 0 ? a.block_table.sizes[1] : 0;
  }
  params.capacity = within("capacity", capacity, 0, kMostRows);
  params.window_left = window_side("window_left", a.window_left);
  params.window_right = window_side("window_right", a.window_right);
  params.scale = positive_scale(a.scale);
  params.splits = within("splits", a.splits, 1, 1 << 16);
  if (params.splits > 1) {
    params.partial_out = workspace(a.partial_out, a.q, {batch, heads, queries, a.splits, head_dim});
    params.partial_lse = workspace(a.partial_lse, a.q, {batch, heads, queries, a.splits});
  }
  if (a.q.numel() == 0) return;
  const int dim = static_cast<int>(head_dim);
  check_launch("attention", a.q.dtype == DType::kBfloat16
                                ? attention_decode<Bfloat16>(params, dim, stream)
                                : attention_decode<Half>(params, dim, stream));
}

}  // namespace fuseformer
