// What the host code of feed-forward checks, and makes of tensors.
#pragma once

#include "../tensor_view.h"
#include "params.h"

namespace fuseformer {

// Rows in bytes, and what the last block and the last step reach past the end, are within 32 bits.
constexpr int64_t kMost = 1 << 29;

inline RowTensor matrix(const TensorView& x, const TensorView& like,
                        const std::vector<int64_t>& sizes) {
  require_shape(x, sizes);
  require_dtype(x, like.dtype);
  require_device(x, like);
  require_rows_of_16_bytes(x);
  return {x.data, x.strides[0]};
}

// The sizes of the leading matrix, of 16-bit numbers whose columns come by eights.
inline void require_matrix(const TensorView& x) {
  if (x.dtype != DType::kBfloat16 && x.dtype != DType::kFloat16) {
    refuse(x, name_of(x.dtype), "bfloat16 or float16");
  }
  if (x.sizes.size() != 2) refuse(x, "shape " + shape_text(x.sizes), "2 dimensions");
  for (int64_t size : x.sizes) {
    if (size > kMost) refuse(x, "shape " + shape_text(x.sizes), "at most 2^29 rows and columns");
  }
  if (x.sizes[1] % 8 != 0) {
    refuse(x, std::to_string(x.sizes[1]) + " columns", "a multiple of 8");
  }
}

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: got '" + name +
                              "', expected relu, gelu, gelu_tanh or silu");
}

// Sets what a kernel is told of dropout.
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

// The numbers of a bias, or null without one.
inline const void* bias(const TensorView& x, const TensorView& like, int64_t size) {
  if (!x.given) return nullptr;
  require_shape(x, {size});
  require_dtype(x, like.dtype);
  require_device(x, like);
  require_rows_of_16_bytes(x);
  return x.data;
}

}  // namespace fuseformer
