// The emulator with the attention kernels for Python: the launches that ship.
#include "../attention/params.h"
#include "../device/element.h"
#include "../device/launch.h"
#include "python.h"

namespace fuseformer {

template <typename Element>
const char* attention_forward(const AttentionParams& params, int head_dim, Stream stream);
template <typename Element>
const char* attention_backward(const AttentionGradientParams& given, int head_dim, Stream stream);
template <typename Element>
int backward_step_rows(int head_dim);

namespace {

// Makes a pointer of a struct an integer in Python, 0 for null.
template <typename Struct, typename Pointer>
void pointer(py::class_<Struct>& type, const char* name, Pointer Struct::* member) {
  type.def_property(
      name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
      [member](Struct& s, uintptr_t address) { s.*member = reinterpret_cast<Pointer>(address); });
}

void check(const char* failure) {
  if (failure != nullptr) throw std::invalid_argument(failure);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  emulator::bind(m);

  py::class_<HeadTensor> tensor(m, "HeadTensor", py::module_local());
  tensor.def(py::init<>())
      .def_readwrite("batch_stride", &HeadTensor::batch_stride)
      .def_readwrite("head_stride", &HeadTensor::head_stride)
      .def_readwrite("row_stride", &HeadTensor::row_stride);
  pointer(tensor, "data", &HeadTensor::data);

  py::class_<AttentionParams> params(m, "AttentionParams", py::module_local());
  params.def(py::init<>())
      .def_readwrite("q", &AttentionParams::q)
      .def_readwrite("k", &AttentionParams::k)
      .def_readwrite("v", &AttentionParams::v)
      .def_readwrite("out", &AttentionParams::out)
      .def_readwrite("lse_batch_stride", &AttentionParams::lse_batch_stride)
      .def_readwrite("lse_head_stride", &AttentionParams::lse_head_stride)
      .def_readwrite("batch", &AttentionParams::batch)
      .def_readwrite("heads", &AttentionParams::heads)
      .def_readwrite("group", &AttentionParams::group)
      .def_readwrite("queries", &AttentionParams::queries)
      .def_readwrite("keys", &AttentionParams::keys)
      .def_readwrite("window_left", &AttentionParams::window_left)
      .def_readwrite("window_right", &AttentionParams::window_right)
      .def_readwrite("bottom_right", &AttentionParams::bottom_right)
      .def_readwrite("scale", &AttentionParams::scale)
      .def_readwrite("dropout_threshold", &AttentionParams::dropout_threshold)
      .def_readwrite("dropout_scale", &AttentionParams::dropout_scale);
  pointer(params, "lse", &AttentionParams::lse);
  pointer(params, "key_lengths", &AttentionParams::key_lengths);
  pointer(params, "cu_seqlens_q", &AttentionParams::cu_seqlens_q);
  pointer(params, "cu_seqlens_k", &AttentionParams::cu_seqlens_k);
  pointer(params, "seed", &AttentionParams::seed);

  py::class_<AttentionGradientParams> gradients(m, "AttentionGradientParams", py::module_local());
  gradients.def(py::init<>())
      .def_readwrite("forward", &AttentionGradientParams::forward)
      .def_readwrite("dout", &AttentionGradientParams::dout)
      .def_readwrite("dk", &AttentionGradientParams::dk)
      .def_readwrite("dv", &AttentionGradientParams::dv)
      .def_readwrite("dq", &AttentionGradientParams::dq)
      .def_readwrite("workspace_rows", &AttentionGradientParams::workspace_rows);
  pointer(gradients, "dlse", &AttentionGradientParams::dlse);
  pointer(gradients, "lse_log2", &AttentionGradientParams::lse_log2);
  pointer(gradients, "delta", &AttentionGradientParams::delta);
  pointer(gradients, "dq_sums", &AttentionGradientParams::dq_sums);
  pointer(gradients, "dq_turns", &AttentionGradientParams::dq_turns);

  m.attr("NO_WINDOW") = kNoWindow;
  m.def("backward_step_rows", [](int head_dim, bool bf16) {
    return bf16 ? backward_step_rows<Bfloat16>(head_dim) : backward_step_rows<Half>(head_dim);
  });
  m.def("attention_forward", [](const AttentionParams& params, int head_dim, bool bf16) {
    check(bf16 ? attention_forward<Bfloat16>(params, head_dim, Stream())
               : attention_forward<Half>(params, head_dim, Stream()));
  });
  m.def("attention_backward", [](const AttentionGradientParams& given, int head_dim, bool bf16) {
    check(bf16 ? attention_backward<Bfloat16>(given, head_dim, Stream())
               : attention_backward<Half>(given, head_dim, Stream()));
  });
}

}  // namespace fuseformer
