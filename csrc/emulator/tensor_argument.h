// Tensors as Python hands them to bindings of the emulator.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../tensor_view.h"

namespace fuseformer {

namespace py = pybind11;

// A tensor is (address, sizes, strides, name of its dtype), None where an op may go without one.
inline TensorView view(const char* name, const py::object& x) {
  TensorView seen;
  seen.name = name;
  if (x.is_none()) return seen;
  const auto parts = x.cast<py::tuple>();
  seen.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
  seen.sizes = parts[1].cast<std::vector<int64_t>>();
  seen.strides = parts[2].cast<std::vector<int64_t>>();
  const auto dtype = parts[3].cast<std::string>();
  for (DType known :
       {DType::kFloat32, DType::kFloat16, DType::kBfloat16, DType::kInt32, DType::kInt64}) {
    if (dtype == name_of(known)) seen.dtype = known;
  }
  seen.given = true;
  return seen;
}

}  // namespace fuseformer
