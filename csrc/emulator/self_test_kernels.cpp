// Kernels that test the emulator itself: each does one thing right, or makes a mistake, and is run
// by its name.
#include <map>
#include <type_traits>

#include "../device/atomic.h"
#include "../device/copy.h"
#include "../device/launch.h"
#include "../device/mma.h"
#include "../device/philox.h"
#include "../device/warp.h"
#include "self_test.h"
#include "self_test_mistakes.h"

namespace fuseformer {
namespace {

struct Tf32 {};

// In: a[32][4], b[32][2], c[32][4] as the lanes hold them, in words. Out: d[32][4].
template <typename Element>
void mma(SelfTest test) {
  const int lane = threadIdx.x;
  const uint32_t* words = in<uint32_t>(test);
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = words[4 * lane + i];
    d[i] = in<float>(test)[192 + 4 * lane + i];
  }
  const uint32_t b0 = words[128 + 2 * lane], b1 = words[128 + 2 * lane + 1];
  if constexpr (std::is_same_v<Element, Tf32>) {
    mma_16x8x8_tf32(d, a, b0, b1);
  } else {
    mma_16x8x16<Element>(d, a, b0, b1);
  }
  for (int i = 0; i < 4; ++i) out<float>(test)[4 * lane + i] = d[i];
}

// Shared memory holds 32 rows of eight numbers, row r at r * value bytes; out: r[32][4].
template <bool kTransposed>
void ldmatrix(SelfTest test) {
  const int lane = threadIdx.x;
  unsigned char* row = dynamic_shared() + lane * test.value;
  for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(row)[i] = 8 * lane + i;
  warp_barrier();
  uint32_t r[4];
  if (kTransposed) {
    ldmatrix_x4_transposed(r, shared_address(row));
  } else {
    ldmatrix_x4(r, shared_address(row));
  }
  for (int i = 0; i < 4; ++i) out<uint32_t>(test)[4 * lane + i] = r[i];
}

void shuffle(SelfTest test) {
  out<float>(test)[threadIdx.x] = shuffle_xor(static_cast<float>(threadIdx.x), test.value);
}

// In: pairs of floats, out: packed words.
template <typename Element>
void packing(SelfTest test) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  out<uint32_t>(test)[i] = pack<Element>(in<float>(test)[2 * i], in<float>(test)[2 * i + 1]);
}

// In: floats, out: their bits, rounded.
void rounding_to_tf32(SelfTest test) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  out<uint32_t>(test)[i] = to_tf32(in<float>(test)[i]);
}

// Out: the number of each 16-bit pattern.
template <typename Element>
void widening(SelfTest test) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  out<float>(test)[i] = to_float(Element{static_cast<uint16_t>(i)});
}

// Two groups of one copy each; waits until `value` are on their way, and reads the first one.
void copy_groups(SelfTest test) {
  const int thread = threadIdx.x;
  const uint32_t* source = in<uint32_t>(test) + 4 * thread;
  copy_async_16(shared_address(shared<uint32_t>() + 4 * thread), source);
  copy_async_commit();
  copy_async_16_or_zero(shared_address(shared<uint32_t>() + 128 + 4 * thread), source, false);
  copy_async_commit();
  copy_async_wait_for(test.value);
  for (int i = 0; i < 4; ++i) {
    out<uint32_t>(test)[8 * thread + i] = shared<uint32_t>()[4 * thread + i];
  }
  copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) {
    out<uint32_t>(test)[8 * thread + 4 + i] = shared<uint32_t>()[128 + 4 * thread + i];
  }
}

// The first warp writes, the second reads behind a named barrier of both, the third takes no part.
void named(SelfTest test) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) shared<int>()[lane] = lane;
  if (warp < 2) named_barrier(1 + test.value, 64);
  if (warp == 1) out<int>(test)[lane] = shared<int>()[31 - lane];
}

void sums(SelfTest test) { atomic_add(out<float>(test), 1.0f); }

void turns(SelfTest test) {
  if (threadIdx.x == 0) wait_for_turn(out<int>(test), blockIdx.x + test.value);
  block_barrier();
  if (threadIdx.x == 0) pass_turn(out<int>(test));
}

// The sum of numbers that depends on their order, with turns or without.
void order(SelfTest test) {
  const float numbers[4] = {1.0f, 0x1p26f, 3.0f, -0x1p26f};
  const bool in_turn = test.value == 0 && threadIdx.x == 0;
  shared<int>()[threadIdx.x] = blockIdx.x;
  block_barrier();
  if (in_turn) wait_for_turn(out<int>(test), blockIdx.x);
  block_barrier();
  if (threadIdx.x == 0) atomic_add(out<float>(test) + 1, numbers[shared<int>()[63] % 4]);
  block_barrier();
  if (in_turn) pass_turn(out<int>(test));
}

void philox_words(SelfTest test) {
  uint32_t words[4];
  const uint32_t* given = in<uint32_t>(test);
  philox(words, {given[0], given[1]}, given[2], given[3], given[4], given[5]);
  for (int i = 0; i < 4; ++i) out<uint32_t>(test)[i] = words[i];
}

// An accumulator that nobody has set to 0, in blocks that find the stacks of others.
void accumulator_not_set(SelfTest test) {
  float d[4];
  const uint32_t a[4] = {};
  mma_16x8x16<Half>(d, a, 0, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 4; ++i) out<float>(test)[4 * blockIdx.x + i] = d[i];
  }
  float used[64] = {};
  for (int i = 0; i < 64; i += 4) {
    mma_16x8x16<Half>(reinterpret_cast<float (&)[4]>(used[i]), a, 0, 0);
  }
}

// Stores of four bytes, `value` bytes from lane to lane; of sixteen, where that is negative; and
// all lanes reading one word, where it is 0.
void plain_conflicts(SelfTest test) {
  const int lane = threadIdx.x;
  if (test.value > 0) {
    *reinterpret_cast<int*>(dynamic_shared() + lane * test.value) = lane;
  } else if (test.value < 0) {
    copy_16(dynamic_shared() - lane * test.value, in<int>(test) + lane % 8 * 4);
  } else {
    if (lane == 0) shared<int>()[0] = 7;
    warp_barrier();
    out<int>(test)[lane] = shared<int>()[0];
  }
}

// All lanes of a matrix point to one row.
void ldmatrix_of_one_row(SelfTest test) {
  shared<uint32_t>()[threadIdx.x] = threadIdx.x;
  warp_barrier();
  uint32_t r[4];
  ldmatrix_x4(r, shared_address(shared<uint32_t>() + threadIdx.x / 8 * 4));
  out<uint32_t>(test)[threadIdx.x] = r[0];
}

struct Entry {
  void (*kernel)(SelfTest);
  unsigned blocks, threads;
};

const std::map<std::string, Entry> kTests = {
    {"mma_bf16", {mma<Bfloat16>, 1, 32}},
    {"mma_fp16", {mma<Half>, 1, 32}},
    {"mma_tf32", {mma<Tf32>, 1, 32}},
    {"ldmatrix", {ldmatrix<false>, 1, 32}},
    {"ldmatrix_transposed", {ldmatrix<true>, 1, 32}},
    {"shuffle", {shuffle, 1, 32}},
    {"pack_bf16", {packing<Bfloat16>, 8, 32}},
    {"pack_fp16", {packing<Half>, 8, 32}},
    {"round_tf32", {rounding_to_tf32, 16, 32}},
    {"widen_bf16", {widening<Bfloat16>, 2048, 32}},
    {"widen_fp16", {widening<Half>, 2048, 32}},
    {"copy_groups", {copy_groups, 1, 32}},
    {"named", {named, 1, 96}},
    {"sums", {sums, 4, 64}},
    {"turns", {turns, 4, 32}},
    {"order", {order, 16, 64}},
    {"philox", {philox_words, 1, 32}},
    {"turn_of_a_later_block", {turn_of_a_later_block, 4, 32}},
    {"turn_is_kept", {turn_is_kept, 1, 32}},
    {"sum_after_its_turn", {sum_after_its_turn, 1, 32}},
    {"sum_before_its_turn", {sum_before_its_turn, 1, 32}},
    {"sum_beside_the_wait", {sum_beside_the_wait, 1, 32}},
    {"turn_beside_the_sum", {turn_beside_the_sum, 1, 32}},
    {"read_past_global", {read_past_global, 1, 32}},
    {"write_past_global", {write_past_global, 1, 32}},
    {"read_past_shared", {read_past_shared, 1, 32}},
    {"write_past_shared", {write_past_shared, 1, 32}},
    {"copy_past_shared", {copy_past_shared, 1, 32}},
    {"copy_past_global", {copy_past_global, 1, 32}},
    {"copy_misaligned", {copy_misaligned, 1, 32}},
    {"ldmatrix_past_shared", {ldmatrix_past_shared, 1, 32}},
    {"misaligned", {misaligned, 1, 32}},
    {"uninitialised_shared", {uninitialised_shared, 1, 32}},
    {"uninitialised_global", {uninitialised_global, 1, 32}},
    {"race_of_writes", {race_of_writes, 1, 32}},
    {"exchange", {exchange, 1, 64}},
    {"race_of_blocks", {race_of_blocks, 2, 32}},
    {"read_in_flight", {read_in_flight, 1, 32}},
    {"divergent", {divergent, 1, 32}},
    {"left_barrier", {left_barrier, 1, 64}},
    {"deadlock", {deadlock, 1, 64}},
    {"accumulator_not_set", {accumulator_not_set, 3, 32}},
    {"plain_conflicts", {plain_conflicts, 1, 32}},
    {"ldmatrix_of_one_row", {ldmatrix_of_one_row, 1, 32}},
    {"race_of_blocks_that_read", {race_of_blocks_that_read, 2, 32}},
    {"sum_of_uninitialised", {sum_of_uninitialised, 1, 32}},
    {"copies_to_one_place", {copies_to_one_place, 1, 32}},
    {"barrier_of_no_such_number", {barrier_of_no_such_number, 1, 32}},
    {"barrier_of_two_sizes", {barrier_of_two_sizes, 1, 96}},
    {"wild_pointer", {wild_pointer, 1, 32}},
    {"division_by_zero", {division_by_zero, 1, 32}},
    {"index_past_registers", {index_past_registers, 1, 32}},
};

}  // namespace

bool run_self_test(const std::string& name, const SelfTest& test) {
  const auto found = kTests.find(name);
  if (found == kTests.end()) return false;
  launch_kernel(found->second.kernel, found->second.blocks, found->second.threads, 4096, Stream(),
                test);
  return true;
}

}  // namespace fuseformer
