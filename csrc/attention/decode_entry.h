// What the translation units of decoding offer the host.
#pragma once

#include "../device/stream.h"

namespace fuseformer {

struct DecodeParams;

// Starts decoding in one dtype. Returns null, or why nothing was started.
template <typename Element>
const char* attention_decode(const DecodeParams& params, int head_dim, Stream stream);

}  // namespace fuseformer
