// The emulator with the feed-forward kernels for Python: the calls that ship, from tensors on.
#include "../feed_forward/backward.h"
#include "../feed_forward/feed_forward.h"
#include "../feed_forward/few_rows.h"
#include "../feed_forward/gated.h"
#include "../feed_forward/linear.h"
#include "python.h"
#include "tensor_argument.h"

namespace fuseformer {

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
  m.def("feed_forward_backward", [](const py::args& args) {
    FeedForwardGradientArguments a;
    a.dy = view("dy", args[0]);
    a.x = view("x", args[1]);
    a.w1 = view("w1", args[2]);
    a.b1 = view("b1", args[3]);
    a.w2 = view("w2", args[4]);
    a.dx = view("dx", args[5]);
    a.dw1 = view("dw1", args[6]);
    a.db1 = view("db1", args[7]);
    a.dw2 = view("dw2", args[8]);
    a.dx_sums = view("dx_sums", args[9]);
    a.turns = view("turns", args[10]);
    a.weight_sums = view("weight_sums", args[11]);
    a.bias_sums = view("bias_sums", args[12]);
    a.seed = view("seed", args[13]);
    a.activation = args[14].cast<std::string>();
    a.dropout_threshold = args[15].cast<int64_t>();
    a.dropout_scale = args[16].cast<double>();
    run_feed_forward_backward(a, nullptr);
  });
  m.def("feed_forward_step_tokens", [](const py::object& x) {
    const TensorView seen = view("x", x);
    return feed_forward_step_tokens(seen.sizes.back(), seen.dtype);
  });
  m.def("feed_forward_block_units", [](const py::object& x) {
    const TensorView seen = view("x", x);
    return feed_forward_block_units(seen.sizes.back(), seen.dtype);
  });
  m.def("linear_activation", [](const py::args& args) {
    LinearArguments a;
    a.x = view("x", args[0]);
    a.w = view("w", args[1]);
    a.bias = view("bias", args[2]);
    a.act = view("act", args[3]);
    a.pre = view("pre", args[4]);
    a.seed = view("seed", args[5]);
    a.activation = args[6].cast<std::string>();
    a.dropout_threshold = args[7].cast<int64_t>();
    a.dropout_scale = args[8].cast<double>();
    run_linear_activation(a, nullptr);
  });
  m.def("activation_gradient", [](const py::args& args) {
    ActivationGradientArguments a;
    a.dact = view("dact", args[0]);
    a.pre = view("pre", args[1]);
    a.dbias = view("dbias", args[2]);
    a.seed = view("seed", args[3]);
    a.activation = args[4].cast<std::string>();
    a.dropout_threshold = args[5].cast<int64_t>();
    a.dropout_scale = args[6].cast<double>();
    run_activation_gradient(a, nullptr);
  });
  m.def("gated_activation", [](const py::args& args) {
    GatedArguments a;
    a.x = view("x", args[0]);
    a.w_gate = view("w_gate", args[1]);
    a.w_up = view("w_up", args[2]);
    a.act = view("act", args[3]);
    a.gate_pre = view("gate_pre", args[4]);
    a.up = view("up", args[5]);
    a.seed = view("seed", args[6]);
    a.activation = args[7].cast<std::string>();
    a.dropout_threshold = args[8].cast<int64_t>();
    a.dropout_scale = args[9].cast<double>();
    run_gated_activation(a, nullptr);
  });
  m.def("gated_gradient", [](const py::args& args) {
    GatedGradientArguments a;
    a.dact = view("dact", args[0]);
    a.gate_pre = view("gate_pre", args[1]);
    a.up = view("up", args[2]);
    a.dup = view("dup", args[3]);
    a.act = view("act", args[4]);
    a.seed = view("seed", args[5]);
    a.activation = args[6].cast<std::string>();
    a.dropout_threshold = args[7].cast<int64_t>();
    a.dropout_scale = args[8].cast<double>();
    run_gated_gradient(a, nullptr);
  });
  m.def("few_rows_hidden", [](const py::args& args) {
    FewRowsHiddenArguments a;
    a.x = view("x", args[0]);
    a.w1 = view("w1", args[1]);
    a.b1 = view("b1", args[2]);
    a.w_up = view("w_up", args[3]);
    a.act = view("act", args[4]);
    a.pre = view("pre", args[5]);
    a.up = view("up", args[6]);
    a.seed = view("seed", args[7]);
    a.activation = args[8].cast<std::string>();
    a.dropout_threshold = args[9].cast<int64_t>();
    a.dropout_scale = args[10].cast<double>();
    run_few_rows_hidden(a, nullptr);
  });
  m.def("few_rows_output", [](const py::args& args) {
    FewRowsOutputArguments a;
    a.act = view("act", args[0]);
    a.w2 = view("w2", args[1]);
    a.b2 = view("b2", args[2]);
    a.partial = view("partial", args[3]);
    a.y = view("y", args[4]);
    run_few_rows_output(a, nullptr);
  });
}

}  // namespace fuseformer
