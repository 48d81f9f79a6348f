// What the host code of attention checks, and makes of tensors.
#pragma once

#include <cmath>
#include <limits>

#include "../tensor_view.h"
#include "params.h"

namespace fuseformer {

constexpr int64_t kMostRows = kNoWindow;

inline int64_t require_dims(const TensorView& x, int64_t wanted) {
  if (static_cast<int64_t>(x.sizes.size()) != wanted) {
    refuse(x, "shape " + shape_text(x.sizes), std::to_string(wanted) + " dimensions");
  }
  return wanted;
}

inline int within(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                ", expected " + std::to_string(least) + " to " +
                                std::to_string(most));
  }
  return static_cast<int>(value);
}

// A tensor of rows for heads like `like`, of as many heads and rows as `sizes` says.
inline HeadTensor head_tensor(const TensorView& x, const TensorView& like,
                              const std::vector<int64_t>& sizes) {
  require_shape(x, sizes);
  require_dtype(x, like.dtype);
  require_device(x, like);
  require_rows_of_16_bytes(x);
  if (x.sizes.size() == 3) return {x.data, 0, x.strides[1], x.strides[0]};
  return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}

inline const int* offsets(const TensorView& x, const TensorView& like, int64_t size) {
  require_dtype(x, DType::kInt32);
  require_device(x, like);
  require_shape(x, {size});
  require_contiguous(x);
  return static_cast<const int*>(x.data);
}

inline float* workspace(const TensorView& x, const TensorView& like,
                        const std::vector<int64_t>& sizes) {
  require_dtype(x, DType::kFloat32);
  require_device(x, like);
  require_shape(x, sizes);
  require_contiguous(x);
  return static_cast<float*>(x.data);
}

// The keys to one side of a window, -1 for all of them.
inline int window_side(const char* name, int64_t window) {
  const int given = within(name, window, -1, std::numeric_limits<int>::max());
  return given < 0 || given > kNoWindow ? kNoWindow : given;
}

// The kernels find the largest product before they scale it.
inline float positive_scale(double scale) {
  const float narrow = static_cast<float>(scale);
  if (!(narrow > 0.0f) || std::isinf(narrow)) {
    throw std::invalid_argument("scale: got " + std::to_string(scale) +
                                ", expected a positive, finite float32");
  }
  return narrow;
}

}  // namespace fuseformer
