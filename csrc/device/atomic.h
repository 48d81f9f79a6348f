// Sums in global memory, and the order in which blocks add to them.
#pragma once

#include "platform.h"

namespace fuseformer {

#if defined(__CUDACC__)

// *target += x, as one; nothing waits for it.
FUSEFORMER_DEVICE void atomic_add(float* target, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(x) : "memory");
}

// Waits until `*counter` is `value`, one thread of the block; what others wrote before `pass_turn`
// is seen afterwards by all threads behind a barrier. Blocks of smaller numbers must get there.
FUSEFORMER_DEVICE void wait_for_turn(const int* counter, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen != value);
}

// Makes what this thread has added visible to all blocks, before a barrier and `pass_turn`.
FUSEFORMER_DEVICE void publish() { __threadfence(); }

// Adds one to `*counter`, one thread of the block, after a barrier.
FUSEFORMER_DEVICE void pass_turn(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

#else

void atomic_add(float* target, float x);
void wait_for_turn(const int* counter, int value);
void publish();
void pass_turn(int* counter);

#endif

}  // namespace fuseformer
