// A stream of a GPU as host code hands it on that knows nothing of CUDA; the emulator has none.
#pragma once

namespace fuseformer {
using Stream = void*;
}
