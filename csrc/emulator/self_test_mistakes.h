// Kernels that each do one thing wrong, which the emulator must see. `out` holds 32 ints, `in` 32
// ints.
#pragma once

#include "../device/atomic.h"
#include "../device/copy.h"
#include "../device/mma.h"
#include "self_test_arguments.h"

namespace fuseformer {
namespace {

// Of a counter that is -1 at first, as all bits of memory are set.
void turn_of_a_later_block(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), 2 - blockIdx.x);
  block_barrier();
  if (threadIdx.x == 0) pass_turn(out<int>(test));
}

void turn_is_kept(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), -1);
}

void sum_before_its_turn(SelfTest test) {
  atomic_add(out<float>(test) + 1, 1.0f);
  block_barrier();
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), -1);
  block_barrier();
  if (threadIdx.x == 0) pass_turn(out<int>(test));
}

// Whether the last lane comes last or not: nothing makes it.
void sum_beside_the_wait(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), -1);
  if (threadIdx.x == 31) atomic_add(out<float>(test) + 1, 1.0f);
  block_barrier();
  if (threadIdx.x == 0) pass_turn(out<int>(test));
}

void turn_beside_the_sum(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), -1);
  block_barrier();
  if (threadIdx.x == 31) atomic_add(out<float>(test) + 1, 1.0f);
  if (threadIdx.x == 0) pass_turn(out<int>(test));
}

void sum_after_its_turn(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), -1);
  block_barrier();
  if (threadIdx.x == 0) pass_turn(out<int>(test));
  block_barrier();
  atomic_add(out<float>(test) + 1, 1.0f);
}

void read_past_global(SelfTest test) {
  out<int>(test)[threadIdx.x] = in<int>(test)[threadIdx.x + (threadIdx.x == 31)];
}

void write_past_global(SelfTest test) { out<int>(test)[threadIdx.x + 1] = 0; }

void read_past_shared(SelfTest test) {
  shared<int>()[threadIdx.x] = 0;
  out<int>(test)[threadIdx.x] = shared<int>()[threadIdx.x == 5 ? 1024 : threadIdx.x];
}

void write_past_shared(SelfTest) { shared<int>()[threadIdx.x + 1023] = 0; }

void copy_past_shared(SelfTest test) {
  copy_async_16(shared_address(shared<int>() + 1024), test.in);
  copy_async_wait<0>();
}

void copy_past_global(SelfTest test) {
  copy_async_16(shared_address(shared<int>()), in<int>(test) + 32);
  copy_async_wait<0>();
}

void copy_misaligned(SelfTest test) {
  copy_async_16(shared_address(shared<int>()), in<int>(test) + 1);
}

void ldmatrix_past_shared(SelfTest) {
  shared<int>()[threadIdx.x] = 0;
  uint32_t r[4];
  ldmatrix_x4(r, shared_address(shared<int>() + 1024));
}

void misaligned(SelfTest test) {
  const auto* between = reinterpret_cast<const int*>(in<char>(test) + 2);
  out<int>(test)[threadIdx.x] = threadIdx.x == 0 ? *between : 0;
}

void uninitialised_shared(SelfTest test) {
  out<int>(test)[threadIdx.x] = shared<int>()[threadIdx.x];
}

void uninitialised_global(SelfTest test) {
  shared<int>()[threadIdx.x] = out<int>(test)[threadIdx.x];
}

void race_of_writes(SelfTest) { shared<int>()[0] = threadIdx.x; }

// Correct with both barriers; `value` 1 leaves out the first, 2 the second.
void exchange(SelfTest test) {
  for (int round = 0; round < 2; ++round) {
    shared<int>()[threadIdx.x] = threadIdx.x + round;
    if (test.value != 1) block_barrier();
    out<int>(test)[threadIdx.x] = shared<int>()[63 - threadIdx.x];
    if (test.value != 2) block_barrier();
  }
}

void race_of_blocks(SelfTest test) { out<int>(test)[threadIdx.x] = blockIdx.x; }

void read_in_flight(SelfTest test) {
  const int thread = threadIdx.x;
  copy_async_16(shared_address(shared<int>() + 4 * thread), in<int>(test) + thread % 8 * 4);
  copy_async_commit();
  out<int>(test)[thread] = shared<int>()[4 * thread];
}

void divergent(SelfTest test) {
  float x = 0;
  if (threadIdx.x < 16) {
    x = shuffle_xor(1.0f, 1);
  } else {
    warp_barrier();
  }
  out<float>(test)[threadIdx.x] = x;
}

void left_barrier(SelfTest) {
  if (threadIdx.x < 32) return;
  block_barrier();
}

void deadlock(SelfTest) {
  if (threadIdx.x < 32) named_barrier(1, 64);
}

// Sixteen lanes of a block write their own number after all have read it and their right neighbour:
// what the first block reads of the second is written by that, which has read it too.
void race_of_blocks_that_read(SelfTest test) {
  int* numbers = out<int>(test);
  const int i = 16 * blockIdx.x + threadIdx.x % 16;
  const int sum = numbers[i] + numbers[i == 31 ? i : i + 1];
  block_barrier();
  if (threadIdx.x < 16) numbers[i] = sum;
}

void sum_of_uninitialised(SelfTest test) { atomic_add(out<float>(test) + threadIdx.x, 1.0f); }

void copies_to_one_place(SelfTest test) {
  const SharedAddress target = shared_address(shared<int>() + 4 * threadIdx.x);
  copy_async_16(target, in<int>(test));
  copy_async_16(target, in<int>(test) + 4);
  copy_async_commit();
  copy_async_wait<0>();
}

void barrier_of_no_such_number(SelfTest) { named_barrier(16, 32); }

void barrier_of_two_sizes(SelfTest) { named_barrier(1, threadIdx.x < 32 ? 64 : 96); }

void wild_pointer(SelfTest test) {
  const auto address = static_cast<uintptr_t>(test.value) * 4;
  out<int>(test)[threadIdx.x] = *reinterpret_cast<const volatile int*>(address);
}

void division_by_zero(SelfTest test) { out<int>(test)[threadIdx.x] = 7 / test.value; }

void index_past_registers(SelfTest test) {
  float d[4] = {}, other[4] = {};
  const uint32_t a[4] = {};
  mma_16x8x16<Half>(d, a, 0, 0);
  mma_16x8x16<Half>(other, a, 0, 0);
  out<float>(test)[threadIdx.x] = d[test.value + 4] + other[0];
}

}  // namespace
}  // namespace fuseformer
