#include "linear.h"

#include <limits>

#include "linear_entry.h"

namespace fuseformer {
namespace {

constexpr int64_t kMost = std::numeric_limits<int>::max() - 256;

RowTensor matrix(const TensorView& x, const TensorView& like, const std::vector<int64_t>& sizes) {
  require_shape(x, sizes);
  require_dtype(x, like.dtype);
  require_device(x, like);
  require_rows_of_16_bytes(x);
  return {x.data, x.strides[0]};
}

// The sizes of the leading matrix, of 16-bit numbers whose columns come by eights.
void require_matrix(const TensorView& x) {
  if (x.dtype != DType::kBfloat16 && x.dtype != DType::kFloat16) {
    refuse(x, name_of(x.dtype), "bfloat16 or float16");
  }
  if (x.sizes.size() != 2) refuse(x, "shape " + shape_text(x.sizes), "2 dimensions");
  for (int64_t size : x.sizes) {
    if (size > kMost) refuse(x, "shape " + shape_text(x.sizes), "fewer than 2^31 rows and columns");
  }
  if (x.sizes[1] % 8 != 0) {
    refuse(x, std::to_string(x.sizes[1]) + " columns", "a multiple of 8");
  }
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: got '" + name +
                              "', expected relu, gelu, gelu_tanh or silu");
}

// Sets what both kernels are told of dropout.
template <typename Params, typename Arguments>
void give_dropout(Params& params, const Arguments& a, const TensorView& like) {
  if (!a.seed.given) return;
  require_dtype(a.seed, DType::kInt64);
  require_device(a.seed, like);
  if (a.seed.numel() != 1) refuse(a.seed, "shape " + shape_text(a.seed.sizes), "one number");
  if (a.dropout_threshold < 0 || a.dropout_threshold > 1 << 16) {
    throw std::invalid_argument("dropout_threshold: got " + std::to_string(a.dropout_threshold) +
                                ", expected 0 to 65536");
  }
  params.seed = static_cast<const int64_t*>(a.seed.data);
  params.dropout_threshold = static_cast<uint32_t>(a.dropout_threshold);
  params.dropout_scale = static_cast<float>(a.dropout_scale);
}

void check_launch(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(std::string("feed_forward: ") + failure);
}

}  // namespace

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
  if (a.bias.given) {
    require_shape(a.bias, {hidden});
    require_dtype(a.bias, a.x.dtype);
    require_device(a.bias, a.x);
    require_rows_of_16_bytes(a.bias);
    params.bias = a.bias.data;
  }
  params.tokens = static_cast<int>(tokens);
  params.width = static_cast<int>(width);
  params.hidden = static_cast<int>(hidden);
  give_dropout(params, a, a.x);
  const Activation activation = activation_of(a.activation);
  check_launch(a.x.dtype == DType::kBfloat16
                   ? linear_activation<Bfloat16>(params, activation, stream)
                   : linear_activation<Half>(params, activation, stream));
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
  const Activation activation = activation_of(a.activation);
  check_launch(a.dact.dtype == DType::kBfloat16
                   ? activation_gradient<Bfloat16>(params, activation, stream)
                   : activation_gradient<Half>(params, activation, stream));
}

}  // namespace fuseformer
