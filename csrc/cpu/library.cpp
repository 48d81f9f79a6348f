// The ops of `fuseformer._C` for the CPU, in PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "dropout_mask.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* numbers(const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims && x.scalar_type() == ScalarType::Long && x.is_contiguous(), name,
                  ": got another tensor than contiguous int64 numbers of ", dims, " dimensions");
  return static_cast<const int64_t*>(x.data_ptr());
}

void dropout_mask(const Tensor& seed, const Tensor& batches, const Tensor& heads, int64_t first_row,
                  int64_t first_column, int64_t threshold, const Tensor& keep) {
  const int64_t* const batch = numbers("batches", batches, 1);
  const int64_t* const head = numbers("heads", heads, 1);
  const int64_t* const key = numbers("seed", seed, 0);
  STD_TORCH_CHECK(keep.dim() == 4 && keep.scalar_type() == ScalarType::Bool && keep.is_contiguous(),
                  "keep: got another tensor than contiguous bools of four dimensions");
  STD_TORCH_CHECK(keep.size(0) == batches.size(0) && keep.size(1) == heads.size(0), "keep: got ",
                  keep.size(0), " batches of ", keep.size(1), " heads, expected ", batches.size(0),
                  " of ", heads.size(0));
  STD_TORCH_CHECK(first_row >= 0 && first_column >= 0,
                  "first_row, first_column: got a negative number");
  STD_TORCH_CHECK(threshold >= 0 && threshold <= 65536, "threshold: got ", threshold,
                  ", expected 0 to 65536");
  const fuseformer::DropoutMaskParams params{static_cast<uint64_t>(*key),
                                             static_cast<uint32_t>(threshold),
                                             first_row,
                                             keep.size(2),
                                             first_column,
                                             keep.size(3)};
  if (params.columns == 0) return;
  const int64_t groups = fuseformer::dropout_row_groups(params);
  auto* const first = static_cast<uint8_t*>(keep.data_ptr());
  const int64_t all = batches.size(0) * heads.size(0) * groups;
  // About what a thread takes to start.
  const int64_t least = (1 << 18) / (16 * params.columns) + 1;
  torch::stable::parallel_for(0, all, least, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / groups;
      write_dropout_mask(params, batch[tile / heads.size(0)], head[tile % heads.size(0)],
                         i % groups, first + tile * params.rows * params.columns);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fuseformer_cpu, m) {
  m.def(
      "dropout_mask(Tensor seed, Tensor batches, Tensor heads, int first_row, int first_column, "
      "int threshold, Tensor(a!) keep) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cpu, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}
