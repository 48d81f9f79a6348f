// What the compiled ops need of torch, in its stable ABI: tensors as the checks see them, and
// streams.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "device/stream.h"
#include "tensor_view.h"

// Only the CUDA builds of torch have it: where it is missing no CUDA tensor gets here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fuseformer {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x) {
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

inline TensorView view(const char* name, const Tensor& x) {
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

inline TensorView view(const char* name, const std::optional<Tensor>& x) {
  if (x.has_value()) return view(name, *x);
  TensorView none;
  none.name = name;
  return none;
}

inline Stream current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fuseformer: this torch was built without CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "fuseformer: torch has no current stream for device ", device);
  return stream;
}

}  // namespace fuseformer
