// The emulator with the attention kernels for Python: the calls that ship, from tensors on.
#include "../attention/attention.h"
#include "../attention/decode.h"
#include "python.h"
#include "tensor_argument.h"

namespace fuseformer {
namespace {

// What the schemas of both ops end with, from argument `at` on.
void give_options(AttentionArguments& a, const py::args& args, size_t at) {
  a.key_lengths = view("key_lengths", args[at]);
  a.cu_seqlens_q = view("cu_seqlens_q", args[at + 1]);
  a.cu_seqlens_k = view("cu_seqlens_k", args[at + 2]);
  a.seed = view("seed", args[at + 3]);
  a.max_seqlen_q = args[at + 4].cast<int64_t>();
  a.max_seqlen_k = args[at + 5].cast<int64_t>();
  a.window_left = args[at + 6].cast<int64_t>();
  a.window_right = args[at + 7].cast<int64_t>();
  a.bottom_right = args[at + 8].cast<bool>();
  a.scale = args[at + 9].cast<double>();
  a.dropout_threshold = args[at + 10].cast<int64_t>();
  a.dropout_scale = args[at + 11].cast<double>();
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  emulator::bind(m);

  m.def("attention_forward", [](const py::args& args) {
    AttentionArguments a;
    a.q = view("q", args[0]);
    a.k = view("k", args[1]);
    a.v = view("v", args[2]);
    a.out = view("out", args[3]);
    a.lse = view("lse", args[4]);
    give_options(a, args, 5);
    run_attention_forward(a, nullptr);
  });
  m.def("attention_backward", [](const py::args& args) {
    AttentionGradientArguments a;
    a.dout = view("dout", args[0]);
    a.dlse = view("dlse", args[1]);
    a.q = view("q", args[2]);
    a.k = view("k", args[3]);
    a.v = view("v", args[4]);
    a.out = view("out", args[5]);
    a.lse = view("lse", args[6]);
    a.dq = view("dq", args[7]);
    a.dk = view("dk", args[8]);
    a.dv = view("dv", args[9]);
    a.lse_log2 = view("lse_log2", args[10]);
    a.delta = view("delta", args[11]);
    a.dq_sums = view("dq_sums", args[12]);
    a.dq_turns = view("dq_turns", args[13]);
    give_options(a, args, 14);
    run_attention_backward(a, nullptr);
  });
  m.def("attention_decode", [](const py::args& args) {
    DecodeArguments a;
    a.q = view("q", args[0]);
    a.k_cache = view("k_cache", args[1]);
    a.v_cache = view("v_cache", args[2]);
    a.out = view("out", args[3]);
    a.lse = view("lse", args[4]);
    a.lengths = view("lengths", args[5]);
    a.block_table = view("block_table", args[6]);
    a.partial_out = view("partial_out", args[7]);
    a.partial_lse = view("partial_lse", args[8]);
    a.splits = args[9].cast<int64_t>();
    a.window_left = args[10].cast<int64_t>();
    a.window_right = args[11].cast<int64_t>();
    a.scale = args[12].cast<double>();
    run_decode(a, nullptr);
  });
  m.def("attention_step_rows", [](const py::tuple& q) {
    const TensorView seen = view("q", q);
    return attention_step_rows(seen.sizes.back(), seen.dtype);
  });
}

}  // namespace fuseformer
