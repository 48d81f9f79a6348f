// How the host starts a kernel: on a stream of a GPU, or in the emulator.
#pragma once

#include <cstdint>

#include "platform.h"
#include "stream.h"

#if !defined(__CUDACC__)
#include "../emulator/emulator.h"
#endif

namespace fuseformer {

// The bytes of shared memory that a block may have on the current device.
inline int shared_limit() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    (void)cudaGetLastError();
    return 0;  // what needs least is tried, and its launch says what is wrong
  }
  return bytes;
#else
  return emulator::shared_limit();
#endif
}

// Starts `blocks` blocks of a kernel; nothing for none. Returns null, or what the driver says of
// it.
template <typename Params>
const char* launch_kernel(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
                          Stream stream, const Params& params) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
#if defined(__CUDACC__)
  // More than the 48 KiB that every kernel may have must be asked for.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(params);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // else the next launch would be told of it
  return cudaGetErrorString(status);
#else
  (void)stream;
  // No hook is called on the way to the kernel: it would leave something where registers will lie.
  const auto run = [&]() __attribute__((no_sanitize("thread"))) {
    emulator::poison_registers();
    kernel(params);
  };
  emulator::launch({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, shared_bytes,
                   run);
  return nullptr;
#endif
}

}  // namespace fuseformer
