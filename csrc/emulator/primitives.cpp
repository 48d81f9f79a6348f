// What single threads and warps do, as the PTX manual says: numbers, shuffles, copies, sums.
#include <cmath>
#include <limits>

#include "../device/atomic.h"
#include "../device/copy.h"
#include "../device/element.h"
#include "../device/warp.h"
#include "state.h"

#define CALLER __builtin_return_address(0)

namespace fuseformer {

using namespace emulator;

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t rounded(Bfloat16, float x) {
  const uint32_t bits = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t rounded(Half, float x) {
  const uint16_t sign = bits_of(x) >> 16 & 0x8000;
  if (std::isnan(x)) return 0x7fff;
  const double size = std::fabs(static_cast<double>(x));
  if (size >= 65520.0) return sign | 0x7c00;
  // In units of the last place: 2^-24 below the smallest normal number.
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const double units = std::nearbyint(std::ldexp(size, 10 - exponent));
  // A carry out of the fraction goes into the exponent by itself.
  const uint16_t base = exponent == -14 && units < 1024 ? 0 : (exponent + 15) << 10;
  return sign | static_cast<uint16_t>(base + static_cast<int>(units) - (base ? 1024 : 0));
}

}  // namespace

template <typename Element>
uint32_t pack(float low, float high) {
  return rounded(Element(), low) | static_cast<uint32_t>(rounded(Element(), high)) << 16;
}
template uint32_t pack<Bfloat16>(float, float);
template uint32_t pack<Half>(float, float);

uint32_t to_tf32(float x) { return (bits_of(x) + (std::isfinite(x) ? 0x1000 : 0)) & ~0x1fffu; }

float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

float to_float(Half x) {
  const int exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
  float size;
  if (exponent == 0x1f) {
    size = fraction ? std::numeric_limits<float>::quiet_NaN() : HUGE_VALF;
  } else if (exponent == 0) {
    size = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    size = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000 ? -size : size;
}

float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

float log2_approximate(float x) { return std::fabs(x) < 0x1p-126f ? -HUGE_VALF : std::log2(x); }

float shuffle_xor(float x, int mask) {
  struct Argument {
    float x, result;
    int mask;
  } argument{x, 0.0f, mask};
  collective("a shuffle", argument, [](Argument** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->result = lanes[(i ^ lanes[i]->mask) & 31]->x;
  });
  return argument.result;
}

namespace {

void land(const Copy& copy) {
  if (instrumented) check_access(copy.target, 16, Access::kCopyLands, copy.pc);
  if (copy.source != nullptr) {
    std::memcpy(copy.target, copy.source, 16);
  } else {
    std::memset(copy.target, 0, 16);
  }
}

void begin_copy(SharedAddress target, const void* source, const void* pc) {
  Copy copy{block.shared + target, static_cast<const char*>(source), pc};
  ++report.counters.copies;
  if (target % 16 || reinterpret_cast<uintptr_t>(source) % 16) {
    error("misaligned asynchronous copy", pc);
    return;
  }
  if (!in_shared(copy.target, 16)) {
    error("out of bounds: asynchronous copy to beside the shared memory", pc);
    return;
  }
  if (source != nullptr && !in_global(source, 16)) {
    error("out of bounds: asynchronous copy from beside all allocations", pc);
    copy.source = nullptr;
  }
  if (instrumented) {
    if (copy.source != nullptr) check_access(copy.source, 16, Access::kRead, pc);
    check_access(copy.target, 16, Access::kCopyBegins, pc);
  }
  const Landing landing = options().landing;
  const bool early =
      landing == Landing::kEarly || (landing == Landing::kRandom && random_number() % 2);
  // What has landed early does so once more at the wait: the instruction promises no earlier time.
  if (early && copy.source != nullptr) std::memcpy(copy.target, copy.source, 16);
  if (early && copy.source == nullptr) std::memset(copy.target, 0, 16);
  current->open_copies.push_back(copy);
}

}  // namespace

void copy_async_16(SharedAddress target, const void* source) { begin_copy(target, source, CALLER); }

void copy_async_16_or_zero(SharedAddress target, const void* source, bool exists) {
  begin_copy(target, exists ? source : nullptr, CALLER);
}

void copy_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void copy_async_wait_for(int pending) {
  while (static_cast<int>(current->copy_groups.size()) > pending) {
    for (const Copy& copy : current->copy_groups.front()) land(copy);
    current->copy_groups.pop_front();
  }
}

namespace {

// Whether the running thread has seen what another thread of the block did at `clock`.
bool has_seen(int thread, uint32_t clock) {
  return !instrumented || thread == current->number || clock <= current->clocks[thread];
}

}  // namespace

void atomic_add(float* target, float x) {
  if (!in_global(target, 4)) {
    error("out of bounds: sum beside all allocations", CALLER);
    return;
  }
  if (instrumented) check_access(target, 4, Access::kAtomic, CALLER);
  *target += x;
  current->has_sums = block.has_sums = true;
  if (instrumented) current->summed = current->clocks[current->number];
  if (!block.takes_turns) return;
  if (block.turns.empty() || !has_seen(block.waiter, block.waited)) {
    error("a sum outside of its turn", CALLER);
  }
}

// Sums that are not kept in order may come out in order by chance. So whoever passes a turn on must
// have waited for it; all threads of the block add behind a barrier after that, and come to another
// one before it is passed on: the barrier and the passer's release make them visible. And who waits
// for a block of a larger number may wait for one that does not begin while it waits.
void wait_for_turn(const int* counter, int value) {
  if (!in_global(counter, 4)) give_up("out of bounds: turn beside all allocations");
  wait_for(counter, value);
  const auto passer = passers.find(counter);
  if (passer != passers.end() && passer->second > block.number) {
    error("the turn does not come but by a block of a larger number, which may not have begun",
          CALLER);
  }
  if (block.has_sums && !block.takes_turns) error("a sum outside of its turn", CALLER);
  block.turns.insert(counter);
  block.takes_turns = true;
  block.waiter = current->number;
  block.waited = instrumented ? current->clocks[current->number] : 0;
}

void pass_turn(int* counter) {
  if (!in_global(counter, 4)) give_up("out of bounds: turn beside all allocations");
  if (!block.turns.erase(counter)) error("a turn is passed on that was not waited for", CALLER);
  for (const Thread& thread : block.threads) {
    const bool seen = instrumented ? has_seen(thread.number, thread.summed) : !thread.has_sums;
    if (&thread != current && !seen) {
      error("a turn is passed on before all sums are added", CALLER);
      break;
    }
  }
  ++*counter;
  passers[counter] = block.number;
  may_let_others_run();
}

}  // namespace fuseformer
