// The ops of feed-forward blocks for GPUs. They fill tensors that Python has allocated.
#include "../stable_tensor.h"
#include "backward.h"
#include "feed_forward.h"
#include "few_rows.h"
#include "gated.h"
#include "linear.h"

namespace {

using fuseformer::ActivationGradientArguments;
using fuseformer::current_stream;
using fuseformer::FeedForwardArguments;
using fuseformer::FeedForwardGradientArguments;
using fuseformer::FewRowsHiddenArguments;
using fuseformer::FewRowsOutputArguments;
using fuseformer::GatedArguments;
using fuseformer::GatedGradientArguments;
using fuseformer::LinearArguments;
using fuseformer::TensorView;
using fuseformer::view;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// What all ops up to the hidden activation end with.
template <typename Arguments>
void give_activation(Arguments& a, const std::optional<Tensor>& seed, const std::string& activation,
                     int64_t dropout_threshold, double dropout_scale) {
  a.seed = view("seed", seed);
  a.activation = activation;
  a.dropout_threshold = dropout_threshold;
  a.dropout_scale = dropout_scale;
}

void feed_forward_forward(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                          const Tensor& w2, const std::optional<Tensor>& b2, const Tensor& y,
                          const std::optional<Tensor>& seed, const std::string& activation,
                          int64_t dropout_threshold, double dropout_scale) {
  FeedForwardArguments a;
  a.x = view("x", x);
  a.w1 = view("w1", w1);
  a.b1 = view("b1", b1);
  a.w2 = view("w2", w2);
  a.b2 = view("b2", b2);
  a.y = view("y", y);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.x.device);
  run_feed_forward_forward(a, current_stream(a.x.device));
}

void feed_forward_backward(const Tensor& dy, const Tensor& x, const Tensor& w1,
                           const std::optional<Tensor>& b1, const Tensor& w2, const Tensor& dx,
                           const Tensor& dw1, const std::optional<Tensor>& db1, const Tensor& dw2,
                           const Tensor& dx_sums, const Tensor& turns, const Tensor& weight_sums,
                           const Tensor& bias_sums, const std::optional<Tensor>& seed,
                           const std::string& activation, int64_t dropout_threshold,
                           double dropout_scale) {
  FeedForwardGradientArguments a;
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
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.x.device);
  run_feed_forward_backward(a, current_stream(a.x.device));
}

void linear_activation(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                       const Tensor& act, const std::optional<Tensor>& pre,
                       const std::optional<Tensor>& seed, const std::string& activation,
                       int64_t dropout_threshold, double dropout_scale) {
  LinearArguments a;
  a.x = view("x", x);
  a.w = view("w", w);
  a.bias = view("bias", bias);
  a.act = view("act", act);
  a.pre = view("pre", pre);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.x.device);
  run_linear_activation(a, current_stream(a.x.device));
}

void activation_gradient(const Tensor& dact, const Tensor& pre, const std::optional<Tensor>& dbias,
                         const std::optional<Tensor>& seed, const std::string& activation,
                         int64_t dropout_threshold, double dropout_scale) {
  ActivationGradientArguments a;
  a.dact = view("dact", dact);
  a.pre = view("pre", pre);
  a.dbias = view("dbias", dbias);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.dact.device);
  run_activation_gradient(a, current_stream(a.dact.device));
}

void gated_activation(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& act,
                      const std::optional<Tensor>& gate_pre, const std::optional<Tensor>& up,
                      const std::optional<Tensor>& seed, const std::string& activation,
                      int64_t dropout_threshold, double dropout_scale) {
  GatedArguments a;
  a.x = view("x", x);
  a.w_gate = view("w_gate", w_gate);
  a.w_up = view("w_up", w_up);
  a.act = view("act", act);
  a.gate_pre = view("gate_pre", gate_pre);
  a.up = view("up", up);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.x.device);
  run_gated_activation(a, current_stream(a.x.device));
}

void gated_gradient(const Tensor& dact, const Tensor& gate_pre, const Tensor& up, const Tensor& dup,
                    const Tensor& act, const std::optional<Tensor>& seed,
                    const std::string& activation, int64_t dropout_threshold,
                    double dropout_scale) {
  GatedGradientArguments a;
  a.dact = view("dact", dact);
  a.gate_pre = view("gate_pre", gate_pre);
  a.up = view("up", up);
  a.dup = view("dup", dup);
  a.act = view("act", act);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.dact.device);
  run_gated_gradient(a, current_stream(a.dact.device));
}

void few_rows_hidden(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                     const std::optional<Tensor>& w_up, const Tensor& act,
                     const std::optional<Tensor>& pre, const std::optional<Tensor>& up,
                     const std::optional<Tensor>& seed, const std::string& activation,
                     int64_t dropout_threshold, double dropout_scale) {
  FewRowsHiddenArguments a;
  a.x = view("x", x);
  a.w1 = view("w1", w1);
  a.b1 = view("b1", b1);
  a.w_up = view("w_up", w_up);
  a.act = view("act", act);
  a.pre = view("pre", pre);
  a.up = view("up", up);
  give_activation(a, seed, activation, dropout_threshold, dropout_scale);
  const DeviceGuard guard(a.x.device);
  run_few_rows_hidden(a, current_stream(a.x.device));
}

void few_rows_output(const Tensor& act, const Tensor& w2, const std::optional<Tensor>& b2,
                     const std::optional<Tensor>& partial, const Tensor& y) {
  FewRowsOutputArguments a;
  a.act = view("act", act);
  a.w2 = view("w2", w2);
  a.b2 = view("b2", b2);
  a.partial = view("partial", partial);
  a.y = view("y", y);
  const DeviceGuard guard(a.act.device);
  run_few_rows_output(a, current_stream(a.act.device));
}

int64_t feed_forward_step_tokens(const Tensor& x) {
  const TensorView seen = view("x", x);
  const DeviceGuard guard(seen.device);
  return fuseformer::feed_forward_step_tokens(seen.sizes.empty() ? 0 : seen.sizes.back(),
                                              seen.dtype);
}

int64_t feed_forward_block_units(const Tensor& x) {
  const TensorView seen = view("x", x);
  const DeviceGuard guard(seen.device);
  return fuseformer::feed_forward_block_units(seen.sizes.empty() ? 0 : seen.sizes.back(),
                                              seen.dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fuseformer_cuda, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cuda, CUDA, m) {
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
}
