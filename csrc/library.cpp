// `fuseformer._C` for GPUs, in PyTorch's stable ABI: one library for every torch from 2.10 on. The
// ops of attention and of feed-forward blocks are in the `library.cpp` of their folders.
//
// They use no memory but the caching allocator's, and nothing waits for the GPU, so that calls can
// be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

namespace {

// The newest CUDA that the driver knows, 13000 for 13.0; 0 without a driver.
int64_t driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int64_t runtime_version() { return CUDART_VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY(fuseformer_cuda, m) {
  m.def("driver_version() -> int");
  m.def("runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fuseformer_cuda, CompositeExplicitAutograd, m) {
  m.impl("driver_version", TORCH_BOX(&driver_version));
  m.impl("runtime_version", TORCH_BOX(&runtime_version));
}
