// Tensors as the host code of kernels sees them, whoever owns them, and the checks it makes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fuseformer {

enum class DType { kFloat32, kFloat16, kBfloat16, kInt32, kInt64, kOther };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBfloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    default:
      return "another dtype";
  }
}

// Strides count elements. A tensor that an op may go without has `data` null and no dimensions.
struct TensorView {
  const char* name = "";
  void* data = nullptr;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  DType dtype = DType::kOther;
  int device = 0;
  bool given = false;

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }
};

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

[[noreturn]] inline void refuse(const TensorView& x, const std::string& got,
                                const std::string& wanted) {
  throw std::invalid_argument(std::string(x.name) + ": got " + got + ", expected " + wanted);
}

inline void require_shape(const TensorView& x, const std::vector<int64_t>& wanted) {
  if (x.sizes != wanted) refuse(x, "shape " + shape_text(x.sizes), shape_text(wanted));
}

inline void require_dtype(const TensorView& x, DType wanted) {
  if (x.dtype != wanted) refuse(x, x.given ? name_of(x.dtype) : "None", name_of(wanted));
}

inline void require_device(const TensorView& x, const TensorView& like) {
  if (x.device != like.device) {
    refuse(x, "device " + std::to_string(x.device),
           "device " + std::to_string(like.device) + " as " + like.name);
  }
}

inline void require_contiguous(const TensorView& x) {
  if (x.numel() == 0) return;
  int64_t wanted = 1;
  for (size_t i = x.sizes.size(); i-- > 0;) {
    if (x.sizes[i] != 1 && x.strides[i] != wanted) {
      refuse(x, "strides " + shape_text(x.strides), "a contiguous tensor");
    }
    wanted *= x.sizes[i];
  }
}

// Rows that are copied 16 bytes at a time: of 16-bit numbers, each begins at a multiple of 16
// bytes.
inline void require_rows_of_16_bytes(const TensorView& x) {
  const size_t last = x.sizes.size() - 1;
  if (x.numel() == 0) return;
  if (x.strides[last] != 1) {
    refuse(x, "stride " + std::to_string(x.strides[last]) + " in the last dimension", "1");
  }
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) {
    refuse(x, "memory that is not aligned to 16 bytes", "an aligned tensor");
  }
  for (size_t i = 0; i < last; ++i) {
    if (x.sizes[i] > 1 && x.strides[i] % 8 != 0) {
      refuse(x, "strides " + shape_text(x.strides), "multiples of 8 before the last dimension");
    }
  }
}

// Throws where a launch of `op` failed: `failure` is what the driver said, null for nothing.
inline void check_launch(const char* op, const char* failure) {
  if (failure != nullptr) throw std::runtime_error(std::string(op) + ": " + failure);
}

}  // namespace fuseformer
