#include "linear.h"

#include "checks.h"
#include "linear_entry.h"

namespace fuseformer {

void run_linear_activation(const LinearArguments& a, Stream stream) {
  require_matrix(a.x);
  require_matrix(a.w);
  const int64_t tokens = a.x.sizes[0], width = a.x.sizes[1], hidden = a.w.sizes[0];
  LinearParams params = {};
  params.x = matrix(a.x, a.x, {tokens, width});
  params.w = matrix(a.w, a.x, {hidden, width});
  require_matrix(a.act);
  params.act = matrix(a.act, a.x, {tokens, hidden});
  if (a.pre.given) params.pre = matrix(a.pre, a.x, {tokens, hidden});
  params.bias = bias(a.bias, a.x, hidden);
  params.tokens = static_cast<int>(tokens);
  params.width = static_cast<int>(width);
  params.hidden = static_cast<int>(hidden);
  give_dropout(params, a, a.x);
  params.activation = activation_of(a.activation);
  check_launch("feed_forward", a.x.dtype == DType::kBfloat16
                                   ? linear_activation<Bfloat16>(params, stream)
                                   : linear_activation<Half>(params, stream));
}

void run_activation_gradient(const ActivationGradientArguments& a, Stream stream) {
  require_matrix(a.dact);
  const int64_t tokens = a.dact.sizes[0], hidden = a.dact.sizes[1];
  ActivationGradientParams params = {};
  params.dact = matrix(a.dact, a.dact, {tokens, hidden});
  params.pre = matrix(a.pre, a.dact, {tokens, hidden});
  if (a.dbias.given) {
    require_dtype(a.dbias, DType::kFloat32);
    require_device(a.dbias, a.dact);
    require_shape(a.dbias, {(tokens + kGradientRows - 1) / kGradientRows, hidden});
    require_contiguous(a.dbias);
    params.dbias = static_cast<float*>(a.dbias.data);
  }
  params.tokens = static_cast<int>(tokens);
  params.hidden = static_cast<int>(hidden);
  give_dropout(params, a, a.dact);
  params.activation = activation_of(a.activation);
  check_launch("feed_forward", a.dact.dtype == DType::kBfloat16
                                   ? activation_gradient<Bfloat16>(params, stream)
                                   : activation_gradient<Half>(params, stream));
}

}  // namespace fuseformer
