// What the translation units of the few-rows regime offer the host.
#pragma once

#include "../device/stream.h"
#include "few_rows_params.h"

namespace fuseformer {

struct Bfloat16;
struct Half;

// Start the kernels of one dtype. Return null, or why nothing was started.
template <typename Element>
const char* few_rows_hidden(const FewRowsParams& params, Stream stream);
template <typename Element>
const char* few_rows_output(const FewRowsParams& params, Stream stream);

}  // namespace fuseformer
