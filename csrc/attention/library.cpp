// The ops of attention for GPUs. They fill tensors that Python has allocated.
#include "../stable_tensor.h"
#include "attention.h"
#include "decode.h"

namespace {

using fuseformer::AttentionArguments;
using fuseformer::AttentionGradientArguments;
using fuseformer::current_stream;
using fuseformer::DecodeArguments;
using fuseformer::TensorView;
using fuseformer::view;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Names of the arguments as errors show them, in the order of the schemas.
constexpr const char* kAttention = "Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, ";
constexpr const char* kGradients =
    "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) lse_log2, Tensor(e!) delta, "
    "Tensor(f!) dq_sums, Tensor(g!)? dq_turns, ";
constexpr const char* kOptions =
    "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, "
    "int max_seqlen_q, int max_seqlen_k, int window_left, int window_right, bool bottom_right, "
    "float scale, int dropout_threshold, float dropout_scale) -> ()";

struct Options {
  const std::optional<Tensor>&key_lengths, &cu_seqlens_q, &cu_seqlens_k, &seed;
  int64_t max_seqlen_q, max_seqlen_k, window_left, window_right;
  bool bottom_right;
  double scale;
  int64_t dropout_threshold;
  double dropout_scale;

  void give(AttentionArguments& a) const {
    a.key_lengths = view("key_lengths", key_lengths);
    a.cu_seqlens_q = view("cu_seqlens_q", cu_seqlens_q);
    a.cu_seqlens_k = view("cu_seqlens_k", cu_seqlens_k);
    a.seed = view("seed", seed);
    a.max_seqlen_q = max_seqlen_q;
    a.max_seqlen_k = max_seqlen_k;
    a.window_left = window_left;
    a.window_right = window_right;
    a.bottom_right = bottom_right;
    a.scale = scale;
    a.dropout_threshold = dropout_threshold;
    a.dropout_scale = dropout_scale;
  }
};

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                       const Tensor& lse, const std::optional<Tensor>& key_lengths,
                       const std::optional<Tensor>& cu_seqlens_q,
                       const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seed,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t window_left,
                       int64_t window_right, bool bottom_right, double scale,
                       int64_t dropout_threshold, double dropout_scale) {
  AttentionArguments a;
  a.q = view("q", q);
  a.k = view("k", k);
  a.v = view("v", v);
  a.out = view("out", out);
  a.lse = view("lse", lse);
  Options{key_lengths, cu_seqlens_q, cu_seqlens_k, seed,  max_seqlen_q,      max_seqlen_k,
          window_left, window_right, bottom_right, scale, dropout_threshold, dropout_scale}
      .give(a);
  const DeviceGuard guard(a.q.device);
  run_attention_forward(a, current_stream(a.q.device));
}

void attention_backward(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk,
    const Tensor& dv, const Tensor& lse_log2, const Tensor& delta, const Tensor& dq_sums,
    const std::optional<Tensor>& dq_turns, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
    int64_t window_left, int64_t window_right, bool bottom_right, double scale,
    int64_t dropout_threshold, double dropout_scale) {
  AttentionGradientArguments a;
  a.q = view("q", q);
  a.k = view("k", k);
  a.v = view("v", v);
  a.out = view("out", out);
  a.lse = view("lse", lse);
  a.dout = view("dout", dout);
  a.dlse = view("dlse", dlse);
  a.dq = view("dq", dq);
  a.dk = view("dk", dk);
  a.dv = view("dv", dv);
  a.lse_log2 = view("lse_log2", lse_log2);
  a.delta = view("delta", delta);
  a.dq_sums = view("dq_sums", dq_sums);
  a.dq_turns = view("dq_turns", dq_turns);
  Options{key_lengths, cu_seqlens_q, cu_seqlens_k, seed,  max_seqlen_q,      max_seqlen_k,
          window_left, window_right, bottom_right, scale, dropout_threshold, dropout_scale}
      .give(a);
  const DeviceGuard guard(a.q.device);
  run_attention_backward(a, current_stream(a.q.device));
}

void attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& out, const Tensor& lse, const Tensor& lengths,
                      const std::optional<Tensor>& block_table,
                      const std::optional<Tensor>& partial_out,
                      const std::optional<Tensor>& partial_lse, int64_t splits, int64_t window_left,
                      int64_t window_right, double scale) {
  DecodeArguments a;
  a.q = view("q", q);
  a.k_cache = view("k_cache", k_cache);
  a.v_cache = view("v_cache", v_cache);
  a.out = view("out", out);
  a.lse = view("lse", lse);
  a.lengths = view("lengths", lengths);
  a.block_table = view("block_table", block_table);
  a.partial_out = view("partial_out", partial_out);
  a.partial_lse = view("partial_lse", partial_lse);
  a.splits = splits;
  a.window_left = window_left;
  a.window_right = window_right;
  a.scale = scale;
  const DeviceGuard guard(a.q.device);
  run_decode(a, current_stream(a.q.device));
}

int64_t attention_step_rows(const Tensor& q) {
  const TensorView seen = view("q", q);
  const DeviceGuard guard(seen.device);
  return fuseformer::attention_step_rows(seen.sizes.empty() ? 0 : seen.sizes.back(), seen.dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fuseformer_cuda, m) {
  m.def((std::string("attention_forward(") + kAttention + kOptions).c_str());
  m.def((std::string("attention_backward(") + kGradients + kOptions).c_str());
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) lse, "
      "Tensor lengths, Tensor? block_table, Tensor(c!)? partial_out, Tensor(d!)? partial_lse, "
      "int splits, int window_left, int window_right, float scale) -> ()");
  m.def("attention_step_rows(Tensor q) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("attention_step_rows", TORCH_BOX(&attention_step_rows));
}
