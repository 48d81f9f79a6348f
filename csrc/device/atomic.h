// Sums in global memory, and the order in which blocks add to them.
#pragma once

#include "platform.h"

namespace fuseformer {

#if defined(__CUDACC__)

// *target += x, as one; nothing waits for it.
FUSEFORMER_DEVICE void atomic_add(float* target, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(x) : "memory");
}

// Waits until `*counter` is at least `value`, one thread of the block. Behind a barrier all threads
// then see what others added before `pass_turn`. A counter that is ahead lets the block go on; one
// that nobody advances, for at least tens of seconds, ends the launch with an error.
FUSEFORMER_DEVICE void wait_for_turn(const int* counter, int value) {
  for (uint32_t polls = 1u << 26;; --polls) {
    int seen;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= value) return;
    if (polls == 0) asm volatile("trap;");
  }
}

// Adds one to `*counter`: one thread, behind a barrier that follows the last sum of each thread of
// the block. In the PTX memory model the barrier orders all these sums before the release, which is
// cumulative: whoever acquires the counter sees them too. So no other thread needs a fence.
FUSEFORMER_DEVICE void pass_turn(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

#else

void atomic_add(float* target, float x);
void wait_for_turn(const int* counter, int value);
void pass_turn(int* counter);

#endif

}  // namespace fuseformer
