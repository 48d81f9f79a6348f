// What the parts of the emulator know of the block that is running, and of its threads.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "emulator.h"

namespace fuseformer::emulator {

// How many blocks run at the same time where schedules are random.
constexpr int kResidentBlocks = 4;

// The clock of a thread for each thread of its block: what it has seen of the others.
using Clocks = std::vector<uint32_t>;

struct Copy {
  char* target;
  const char* source;  // null: zeros
  const void* pc;      // where the kernel has begun it
};

struct Thread {
  Place place;
  int number = 0;  // within the block
  void* stack_pointer = nullptr;
  char* stack_top = nullptr;
  bool done = false;
  bool has_sums = false;  // in global memory, since it was last at a barrier of the block
  uint32_t summed = 0;    // when it has last added to any, by its clock
  const char* waits_for = nullptr;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
  Clocks clocks;
};

// A rendezvous of the lanes of one warp.
struct Warp {
  uint32_t arrived = 0;
  const char* collective = nullptr;
  void* arguments[32];
  std::vector<int> ready;  // threads that can run
  uint32_t priority = 0;
};

struct Barrier {
  int expected = 0;  // threads, as those that wait have said
  std::vector<int> waiting;
};

// What a thread waits for that other blocks do.
struct Awaited {
  int thread;
  const int* counter;
  int value;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<Awaited> awaited;
  std::set<const int*> turns;  // that this block has waited for and not passed on
  bool takes_turns = false;    // has waited for one
  bool has_sums = false;       // in global memory
  int waiter = 0;              // who has last waited for a turn, and when by its clock
  uint32_t waited = 0;
  int live = 0;
  int slot = 0;         // among the blocks that run at the same time
  uint64_t number = 0;  // counted over all launches
  char* shared = nullptr;
  size_t shared_bytes = 0;
};

extern Block block;
// The number of the block that has passed a turn on last, in this launch.
extern std::map<const int*, uint64_t> passers;
extern Thread* current;
extern Report report;
// Whether the kernel is compiled with hooks: set by the first access that comes in.
extern bool instrumented;

uint32_t random_number();

// Adds an error of the thread that is running; `pc` is where in the kernel, if known. The same
// error at the same place is counted, and reported with the `detail` of the first.
void error(const std::string& what, const void* pc = nullptr, const std::string& detail = "");

// Ends the launch: nothing more of it is run.
[[noreturn]] void give_up(const std::string& what, const void* pc = nullptr);

// Lets others run until this thread is made ready again, or until `*counter` is `value`.
void wait(const char* what);
void wait_for(const int* counter, int value);
// Where schedules are random, may let other blocks run; the thread goes on later.
void may_let_others_run();
// Draws the order of the warps anew.
void shuffle_warps();
void make_ready(int thread);

// The threads in `joined` have seen of all what any of them has seen.
void join_clocks(const std::vector<int>& joined);

// Brings the lanes of a warp together: the last of them to arrive calls `carry_out` with the
// arguments of all 32.
template <typename Argument, typename Function>
void collective(const char* name, Argument& argument, Function&& carry_out);

enum class Access { kRead, kWrite, kAtomic, kCopyBegins, kCopyLands };

// Checks an access of the thread that is running, where kernels are instrumented.
void check_access(const void* address, size_t bytes, Access access, const void* pc);

// Whether the address lies in an allocation of global memory, or in the shared memory of the block.
bool in_global(const void* address, size_t bytes);
bool in_shared(const void* address, size_t bytes);

// Shared memory of a new block: nothing is initialised, all bits are set.
char* new_shared(size_t bytes);
// What blocks before this one have done is seen by all.
void new_launch(uint64_t first_block);

// While it lives, a fault of the thread that is running (an address that is nobody's, a division by
// zero, what -fsanitize=undefined traps) is an error and ends the launch, instead of the process.
class FaultsAreErrors {
 public:
  FaultsAreErrors();
  ~FaultsAreErrors();
};

// Remembers a plain access to shared memory, of the lane that is running. All lanes of a warp
// having come to the same point, `count_conflicts` compares what the same instruction has done in
// each.
void note_shared_access(const void* address, size_t bytes, const void* pc);
void count_conflicts(int warp);

inline Warp& warp_of(const Thread& thread) { return block.warps[thread.number / 32]; }

template <typename Argument, typename Function>
void collective(const char* name, Argument& argument, Function&& carry_out) {
  Warp& warp = warp_of(*current);
  const int first = current->number / 32 * 32, lane = current->number % 32;
  if (warp.arrived != 0 && std::strcmp(warp.collective, name) != 0) {
    give_up(std::string("divergent warp: some lanes are at ") + warp.collective + ", others at " +
            name);
  }
  warp.collective = name;
  warp.arrived |= 1u << lane;
  warp.arguments[lane] = &argument;
  if (warp.arrived != 0xffffffffu) {
    wait(name);
    return;
  }
  warp.arrived = 0;
  if (instrumented) count_conflicts(current->number / 32);
  Argument* arguments[32];
  for (int i = 0; i < 32; ++i) arguments[i] = static_cast<Argument*>(warp.arguments[i]);
  carry_out(arguments);
  for (int i = 0; i < 32; ++i) {
    if (i != lane) make_ready(first + i);
  }
}

}  // namespace fuseformer::emulator
