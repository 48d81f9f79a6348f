// The words of CUDA that kernels use, for a C++ compiler: a thread is a fiber of the emulator.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace fuseformer::emulator {

struct Place {
  dim3 thread, block, block_size, grid_size;
};

// The place of the fiber that is running.
const Place& place();

}  // namespace fuseformer::emulator

#define threadIdx (::fuseformer::emulator::place().thread)
#define blockIdx (::fuseformer::emulator::place().block)
#define blockDim (::fuseformer::emulator::place().block_size)
#define gridDim (::fuseformer::emulator::place().grid_size)
