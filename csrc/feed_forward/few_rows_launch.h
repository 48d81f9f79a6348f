// Starts the kernels of the few-rows regime of one dtype.
#pragma once

#include "../device/launch.h"
#include "few_rows_entry.h"
#include "few_rows_kernel.h"

namespace fuseformer {

// No tokens have no blocks.
template <typename Traits>
int64_t few_rows_blocks(const FewRowsParams& params) {
  return params.tokens == 0 ? 0 : (params.units + Traits::kUnits - 1) / Traits::kUnits;
}

template <typename Traits>
const char* launch_few_rows_hidden(const FewRowsParams& params, Stream stream) {
  return launch_kernel(few_rows_hidden_kernel<Traits>, few_rows_blocks<Traits>(params),
                       Traits::kThreads, Traits::kSharedBytes, stream, params);
}

template <typename Element>
const char* few_rows_hidden(const FewRowsParams& params, Stream stream) {
  return params.w_up.data != nullptr
             ? launch_few_rows_hidden<FewRowsTraits<Element, 2>>(params, stream)
             : launch_few_rows_hidden<FewRowsTraits<Element>>(params, stream);
}

template <typename Element>
const char* few_rows_output(const FewRowsParams& params, Stream stream) {
  using Traits = FewRowsTraits<Element>;
  const char* failure =
      launch_kernel(few_rows_output_kernel<Traits>, few_rows_blocks<Traits>(params) * params.splits,
                    Traits::kThreads, Traits::kSharedBytes, stream, params);
  if (failure != nullptr || params.partial == nullptr) return failure;
  const int64_t pairs = int64_t{params.tokens} * params.units / 2;
  return launch_kernel(few_rows_sum_kernel<Element>, (pairs + kSumThreads - 1) / kSumThreads,
                       kSumThreads, 0, stream, params);
}

}  // namespace fuseformer
