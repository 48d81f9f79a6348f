// Asynchronous copies from global to shared memory (PTX manual, "Non-bulk copy").
#pragma once

#include "platform.h"

namespace fuseformer {

#if defined(__CUDACC__)

// Copies 16 bytes, both sides aligned to 16; the bytes are there for this thread once it has waited
// for the group, and for others after a barrier behind that.
FUSEFORMER_DEVICE void copy_async_16(SharedAddress target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The same if `exists`; else the source is not read, and zeros are written.
FUSEFORMER_DEVICE void copy_async_16_or_zero(SharedAddress target, const void* source,
                                             bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

// The same as `copy_async_16` if `wanted`, else nothing; without a branch, across which the
// compiler would move no instructions.
FUSEFORMER_DEVICE void copy_async_16_if(SharedAddress target, const void* source, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %2, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16;\n"
      "}\n" ::"r"(target),
      "l"(source), "r"(static_cast<int>(wanted))
      : "memory");
}

// Makes a group of the copies that this thread has begun since the last one.
FUSEFORMER_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending groups that this thread has made last are on their way.
template <int kPending>
FUSEFORMER_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

void copy_async_16(SharedAddress target, const void* source);
void copy_async_16_or_zero(SharedAddress target, const void* source, bool exists);
inline void copy_async_16_if(SharedAddress target, const void* source, bool wanted) {
  if (wanted) copy_async_16(target, source);
}
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int kPending>
void copy_async_wait() {
  copy_async_wait_for(kPending);
}

#endif

}  // namespace fuseformer
