// What lets one kernel source be compiled by nvcc for a GPU, and by a C++ compiler for the
// emulator.
//
// Kernels use the keywords of CUDA, the primitives of this folder, and nothing else: every
// primitive has a body in PTX, which ships, and one in `emulator/`, which runs it on the CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define FUSEFORMER_DEVICE __device__ __forceinline__
#define FUSEFORMER_UNROLL _Pragma("unroll")
#else
#include "../emulator/cuda_keywords.h"
#define FUSEFORMER_DEVICE inline
#define FUSEFORMER_UNROLL
#endif

namespace fuseformer {

// A truth that a generic lambda can take as an argument and know while it is compiled.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Sixteen bytes that are copied at once, aligned to 16.
struct alignas(16) Sixteen {
  uint32_t words[4];
};

FUSEFORMER_DEVICE void copy_16(void* target, const void* source) {
  *static_cast<Sixteen*>(target) = *static_cast<const Sixteen*>(source);
}

// A place in the shared memory of a block, in bytes: what `ldmatrix` and `cp.async` address. Its
// lowest seven bits are those of the pointer, as long as that is aligned to 128 bytes.
using SharedAddress = uint32_t;

#if defined(__CUDACC__)

// Hides from the compiler that `x` stays the same from one step of a loop to the next: what is
// computed from it is computed again where it is used, instead of being kept in registers that are
// needed.
FUSEFORMER_DEVICE void compute_again(uint32_t& x) { asm volatile("" : "+r"(x)); }

FUSEFORMER_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// The dynamic shared memory of the block, aligned to 1,024 bytes.
FUSEFORMER_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fuseformer_dynamic_shared[];
  return fuseformer_dynamic_shared;
}

// Waits for all threads of the block; what they wrote before is seen by all afterwards.
FUSEFORMER_DEVICE void block_barrier() { __syncthreads(); }

// The same for the first `threads` threads that arrive at barrier `id`, 1 to 15.
FUSEFORMER_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Waits for all threads of the warp; what they wrote before is seen by all of it afterwards.
FUSEFORMER_DEVICE void warp_barrier() { __syncwarp(); }

#else

inline void compute_again(uint32_t&) {}
SharedAddress shared_address(const void* pointer);
unsigned char* dynamic_shared();
void block_barrier();
void named_barrier(int id, int threads);
void warp_barrier();

#endif

}  // namespace fuseformer
