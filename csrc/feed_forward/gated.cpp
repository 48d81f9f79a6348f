#include "gated.h"

#include "checks.h"
#include "gated_entry.h"

namespace fuseformer {

void run_gated_activation(const GatedArguments& a, Stream stream) {
  require_matrix(a.x);
  require_matrix(a.w_gate);
  const int64_t tokens = a.x.sizes[0], width = a.x.sizes[1], hidden = a.w_gate.sizes[0];
  LinearParams params = {};
  params.x = matrix(a.x, a.x, {tokens, width});
  params.w = matrix(a.w_gate, a.x, {hidden, width});
  params.w_up = matrix(a.w_up, a.x, {hidden, width});
  if (hidden > 1 && params.w_up.row_stride != params.w.row_stride) {
    refuse(a.w_up, "strides " + shape_text(a.w_up.strides),
           shape_text(a.w_gate.strides) + " as " + a.w_gate.name);
  }
  require_matrix(a.act);
  params.act = matrix(a.act, a.x, {tokens, hidden});
  if (a.gate_pre.given != a.up.given) refuse(a.up, "one of gate_pre and up", "both or none");
  if (a.gate_pre.given) {
    params.pre = matrix(a.gate_pre, a.x, {tokens, hidden});
    params.up = matrix(a.up, a.x, {tokens, hidden});
  }
  params.tokens = static_cast<int>(tokens);
  params.width = static_cast<int>(width);
  params.hidden = static_cast<int>(hidden);
  give_dropout(params, a, a.x);
  params.activation = activation_of(a.activation);
  check_launch("feed_forward", a.x.dtype == DType::kBfloat16
                                   ? gated_activation<Bfloat16>(params, stream)
                                   : gated_activation<Half>(params, stream));
}

void run_gated_gradient(const GatedGradientArguments& a, Stream stream) {
  require_matrix(a.dact);
  const std::vector<int64_t>& sizes = a.dact.sizes;
  GatedGradientParams params = {};
  params.dact = matrix(a.dact, a.dact, sizes);
  params.gate_pre = matrix(a.gate_pre, a.dact, sizes);
  params.up = matrix(a.up, a.dact, sizes);
  params.dup = matrix(a.dup, a.dact, sizes);
  params.act = matrix(a.act, a.dact, sizes);
  params.tokens = static_cast<int>(sizes[0]);
  params.hidden = static_cast<int>(sizes[1]);
  give_dropout(params, a, a.dact);
  params.activation = activation_of(a.activation);
  check_launch("feed_forward", a.dact.dtype == DType::kBfloat16
                                   ? gated_gradient<Bfloat16>(params, stream)
                                   : gated_gradient<Half>(params, stream));
}

}  // namespace fuseformer
