// The emulator with the feed-forward kernels for Python: the calls that ship, from tensors on.
#include "../feed_forward/feed_forward.h"
#include "python.h"

namespace fuseformer {
namespace {

// A tensor is (address, sizes, strides, name of its dtype), None where an op may go without one.
TensorView view(const char* name, const py::object& x) {
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

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  emulator::bind(m);

  m.def("feed_forward_forward", [](const py::args& args) {
    FeedForwardArguments a;
    a.x = view("x", args[0]);
    a.w1 = view("w1", args[1]);
    a.b1 = view("b1", args[2]);
    a.w2 = view("w2", args[3]);
    a.b2 = view("b2", args[4]);
    a.y = view("y", args[5]);
    a.seed = view("seed", args[6]);
    a.activation = args[7].cast<std::string>();
    a.dropout_threshold = args[8].cast<int64_t>();
    a.dropout_scale = args[9].cast<double>();
    run_feed_forward_forward(a, nullptr);
  });
}

}  // namespace fuseformer
