// Decoding for host code: from tensors to launches, the same for PyTorch and for the emulator.
#pragma once

#include "../device/stream.h"
#include "../tensor_view.h"

namespace fuseformer {

// `q` and `out` are (batch, heads, queries, head_dim), the caches (batch, key heads, capacity,
// head_dim), or with a `block_table` (batch, pages of a sequence) (pages, key heads, page size,
// head_dim). `lengths` (batch,) counts the keys of each sequence. The partial results are float32,
// (batch, heads, queries, splits, head_dim) and (batch, heads, queries, splits), given where there
// is more than one split.
struct DecodeArguments {
  TensorView q, k_cache, v_cache, out, lse, lengths, block_table, partial_out, partial_lse;
  int64_t splits = 1;
  int64_t window_left = -1;
  int64_t window_right = 0;
  double scale = 1.0;
};

// Checks every argument and starts the kernels on a stream of the current device. Throws
// `std::invalid_argument` that names the argument before anything has started, and
// `std::runtime_error` with what the driver says of a launch.
void run_decode(const DecodeArguments& arguments, Stream stream);

}  // namespace fuseformer
