// The ops of `fuseformer._C` for GPUs, in PyTorch's stable ABI: one library for every torch
// from 2.10 on.
//
// They fill tensors that Python has allocated: no memory but the caching allocator's is used, and
// nothing waits for the GPU, so that calls can be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "attention/attention.h"
#include "attention/decode.h"
#include "feed_forward/backward.h"
#include "feed_forward/feed_forward.h"
#include "feed_forward/few_rows.h"
#include "feed_forward/gated.h"
#include "feed_forward/linear.h"

// Only the CUDA builds of torch have it: where it is missing no CUDA tensor gets here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using fuseformer::AttentionArguments;
using fuseformer::AttentionGradientArguments;
using fuseformer::DType;
using fuseformer::TensorView;
using torch::stable::Tensor;

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

DType dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBfloat16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      return DType::kOther;
  }
}

TensorView view(const char* name, const Tensor& x) {
  TensorView seen;
  seen.name = name;
  STD_TORCH_CHECK(x.is_cuda(), name, ": got a tensor that is not on a GPU, expected one that is");
  seen.data = const_cast<void*>(x.data_ptr());
  for (int64_t i = 0; i < x.dim(); ++i) {
    seen.sizes.push_back(x.size(i));
    seen.strides.push_back(x.stride(i));
  }
  seen.dtype = dtype_of(x);
  seen.device = x.get_device_index();
  seen.given = true;
  return seen;
}

TensorView view(const char* name, const std::optional<Tensor>& x) {
  if (x.has_value()) return view(name, *x);
  TensorView none;
  none.name = name;
  return none;
}

fuseformer::Stream current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fuseformer: this torch was built without CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "fuseformer: torch has no current stream for device ", device);
  return stream;
}

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
  const torch::stable::accelerator::DeviceGuard guard(a.q.device);
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
  const torch::stable::accelerator::DeviceGuard guard(a.q.device);
  run_attention_backward(a, current_stream(a.q.device));
}

void attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& out, const Tensor& lse, const Tensor& lengths,
                      const std::optional<Tensor>& block_table,
                      const std::optional<Tensor>& partial_out,
                      const std::optional<Tensor>& partial_lse, int64_t splits, int64_t window_left,
                      double scale) {
  fuseformer::DecodeArguments a;
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
  a.scale = scale;
  const torch::stable::accelerator::DeviceGuard guard(a.q.device);
  run_decode(a, current_stream(a.q.device));
}

void feed_forward_forward(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                          const Tensor& w2, const std::optional<Tensor>& b2, const Tensor& y,
                          const std::optional<Tensor>& seed, const std::string& activation,
                          int64_t dropout_threshold, double dropout_scale) {
  fuseformer::FeedForwardArguments a;
  a.x = view("x", x);
  a.w1 = view("w1", w1);
  a.b1 = view("b1", b1);
  a.w2 = view("w2", w2);
  a.b2 = view("b2", b2);
  a.y = view("y", y);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.x.device);
  run_feed_forward_forward(a, current_stream(a.x.device));
}

void feed_forward_backward(const Tensor& dy, const Tensor& x, const Tensor& w1,
                           const std::optional<Tensor>& b1, const Tensor& w2, const Tensor& dx,
                           const Tensor& dw1, const std::optional<Tensor>& db1, const Tensor& dw2,
                           const Tensor& dx_sums, const Tensor& turns, const Tensor& weight_sums,
                           const Tensor& bias_sums, const std::optional<Tensor>& seed,
                           const std::string& activation, int64_t dropout_threshold,
                           double dropout_scale) {
  fuseformer::FeedForwardGradientArguments a;
  a.dy = view("dy", dy);
  a.x = view("x", x);
  a.w1 = view("w1", w1);
  a.b1 = view("b1", b1);
  a.w2 = view("w2", w2);
  a.dx = view("dx", dx);
  a.dw1 = view("dw1", dw1);
  a.db1 = view("db1", db1);
  a.dw2 = view("dw2", dw2);
  a.dx_sums = view("dx_sums", dx_sums);
  a.turns = view("turns", turns);
  a.weight_sums = view("weight_sums", weight_sums);
  a.bias_sums = view("bias_sums", bias_sums);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.x.device);
  run_feed_forward_backward(a, current_stream(a.x.device));
}

void linear_activation(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                       const Tensor& act, const std::optional<Tensor>& pre,
                       const std::optional<Tensor>& seed, const std::string& activation,
                       int64_t dropout_threshold, double dropout_scale) {
  fuseformer::LinearArguments a;
  a.x = view("x", x);
  a.w = view("w", w);
  a.bias = view("bias", bias);
  a.act = view("act", act);
  a.pre = view("pre", pre);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.x.device);
  run_linear_activation(a, current_stream(a.x.device));
}

void activation_gradient(const Tensor& dact, const Tensor& pre, const std::optional<Tensor>& dbias,
                         const std::optional<Tensor>& seed, const std::string& activation,
                         int64_t dropout_threshold, double dropout_scale) {
  fuseformer::ActivationGradientArguments a;
  a.dact = view("dact", dact);
  a.pre = view("pre", pre);
  a.dbias = view("dbias", dbias);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.dact.device);
  run_activation_gradient(a, current_stream(a.dact.device));
}

void gated_activation(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& act,
                      const std::optional<Tensor>& gate_pre, const std::optional<Tensor>& up,
                      const std::optional<Tensor>& seed, const std::string& activation,
                      int64_t dropout_threshold, double dropout_scale) {
  fuseformer::GatedArguments a;
  a.x = view("x", x);
  a.w_gate = view("w_gate", w_gate);
  a.w_up = view("w_up", w_up);
  a.act = view("act", act);
  a.gate_pre = view("gate_pre", gate_pre);
  a.up = view("up", up);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.x.device);
  run_gated_activation(a, current_stream(a.x.device));
}

void gated_gradient(const Tensor& dact, const Tensor& gate_pre, const Tensor& up, const Tensor& dup,
                    const Tensor& act, const std::optional<Tensor>& seed,
                    const std::string& activation, int64_t dropout_threshold,
                    double dropout_scale) {
  fuseformer::GatedGradientArguments a;
  a.dact = view("dact", dact);
  a.gate_pre = view("gate_pre", gate_pre);
  a.up = view("up", up);
  a.dup = view("dup", dup);
  a.act = view("act", act);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.dact.device);
  run_gated_gradient(a, current_stream(a.dact.device));
}

void few_rows_hidden(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                     const std::optional<Tensor>& w_up, const Tensor& act,
                     const std::optional<Tensor>& pre, const std::optional<Tensor>& up,
                     const std::optional<Tensor>& seed, const std::string& activation,
                     int64_t dropout_threshold, double dropout_scale) {
  fuseformer::FewRowsHiddenArguments a;
  a.x = view("x", x);
  a.w1 = view("w1", w1);
  a.b1 = view("b1", b1);
  a.w_up = view("w_up", w_up);
  a.act = view("act", act);
  a.pre = view("pre", pre);
  a.up = view("up", up);
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
  const torch::stable::accelerator::DeviceGuard guard(a.x.device);
  run_few_rows_hidden(a, current_stream(a.x.device));
}

void few_rows_output(const Tensor& act, const Tensor& w2, const std::optional<Tensor>& b2,
                     const std::optional<Tensor>& partial, const Tensor& y) {
  fuseformer::FewRowsOutputArguments a;
  a.act = view("act", act);
  a.w2 = view("w2", w2);
  a.b2 = view("b2", b2);
  a.partial = view("partial", partial);
  a.y = view("y", y);
  const torch::stable::accelerator::DeviceGuard guard(a.act.device);
  run_few_rows_output(a, current_stream(a.act.device));
}

int64_t attention_step_rows(const Tensor& q) {
  const TensorView seen = view("q", q);
  const torch::stable::accelerator::DeviceGuard guard(seen.device);
  return fuseformer::attention_step_rows(seen.sizes.empty() ? 0 : seen.sizes.back(), seen.dtype);
}

int64_t feed_forward_step_tokens(const Tensor& x) {
  const TensorView seen = view("x", x);
  const torch::stable::accelerator::DeviceGuard guard(seen.device);
  return fuseformer::feed_forward_step_tokens(seen.sizes.empty() ? 0 : seen.sizes.back(),
                                              seen.dtype);
}

int64_t feed_forward_block_units(const Tensor& x) {
  const TensorView seen = view("x", x);
  const torch::stable::accelerator::DeviceGuard guard(seen.device);
  return fuseformer::feed_forward_block_units(seen.sizes.empty() ? 0 : seen.sizes.back(),
                                              seen.dtype);
}

// The newest CUDA that the driver knows, 13000 for 13.0; 0 without a driver.
int64_t driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int64_t runtime_version() { return CUDART_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY(fuseformer_cuda, m) {
  m.def((std::string("attention_forward(") + kAttention + kOptions).c_str());
  m.def((std::string("attention_backward(") + kGradients + kOptions).c_str());
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) lse, "
      "Tensor lengths, Tensor? block_table, Tensor(c!)? partial_out, Tensor(d!)? partial_lse, "
      "int splits, int window_left, float scale) -> ()");
  m.def(
      "feed_forward_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor(a!) y, "
      "Tensor? seed, str activation, int dropout_threshold, float dropout_scale) -> ()");
  m.def(
      "feed_forward_backward(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, "
      "Tensor(a!) dx, Tensor(b!) dw1, Tensor(c!)? db1, Tensor(d!) dw2, Tensor(e!) dx_sums, "
      "Tensor(f!) turns, Tensor(g!) weight_sums, Tensor(h!) bias_sums, Tensor? seed, "
      "str activation, int dropout_threshold, float dropout_scale) -> ()");
  m.def("feed_forward_step_tokens(Tensor x) -> int");
  m.def("feed_forward_block_units(Tensor x) -> int");
  m.def(
      "linear_activation(Tensor x, Tensor w, Tensor? bias, Tensor(a!) act, Tensor(b!)? pre, "
      "Tensor? seed, str activation, int dropout_threshold, float dropout_scale) -> ()");
  m.def(
      "activation_gradient(Tensor(a!) dact, Tensor(b!) pre, Tensor(c!)? dbias, Tensor? seed, "
      "str activation, int dropout_threshold, float dropout_scale) -> ()");
  m.def(
      "gated_activation(Tensor x, Tensor w_gate, Tensor w_up, Tensor(a!) act, "
      "Tensor(b!)? gate_pre, Tensor(c!)? up, Tensor? seed, str activation, int dropout_threshold, "
      "float dropout_scale) -> ()");
  m.def(
      "gated_gradient(Tensor(a!) dact, Tensor gate_pre, Tensor up, Tensor(b!) dup, Tensor(c!) act, "
      "Tensor? seed, str activation, int dropout_threshold, float dropout_scale) -> ()");
  m.def(
      "few_rows_hidden(Tensor x, Tensor w1, Tensor? b1, Tensor? w_up, Tensor(a!) act, "
      "Tensor(b!)? pre, Tensor(c!)? up, Tensor? seed, str activation, int dropout_threshold, "
      "float dropout_scale) -> ()");
  m.def(
      "few_rows_output(Tensor act, Tensor w2, Tensor? b2, Tensor(a!)? partial, Tensor(b!) y) -> "
      "()");
  m.def("attention_step_rows(Tensor q) -> int");
  m.def("driver_version() -> int");
  m.def("runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cuda, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("feed_forward_forward", TORCH_BOX(&feed_forward_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
  m.impl("feed_forward_step_tokens", TORCH_BOX(&feed_forward_step_tokens));
  m.impl("feed_forward_block_units", TORCH_BOX(&feed_forward_block_units));
  m.impl("linear_activation", TORCH_BOX(&linear_activation));
  m.impl("activation_gradient", TORCH_BOX(&activation_gradient));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_gradient", TORCH_BOX(&gated_gradient));
  m.impl("few_rows_hidden", TORCH_BOX(&few_rows_hidden));
  m.impl("few_rows_output", TORCH_BOX(&few_rows_output));
  m.impl("attention_step_rows", TORCH_BOX(&attention_step_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cuda, CompositeExplicitAutograd, m) {
  m.impl("driver_version", TORCH_BOX(&driver_version));
  m.impl("runtime_version", TORCH_BOX(&runtime_version));
}
