// Fibers, and whose turn it is among threads and among blocks.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <new>
#include <sstream>

#include "sanitizer.h"
#include "state.h"

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions"
#endif

// Saves the registers that a callee must keep, and goes on where the other stack has left off.
asm(R"(
.text
.globl fuseformer_switch_stacks
.type fuseformer_switch_stacks, @function
fuseformer_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fuseformer_switch_stacks, .-fuseformer_switch_stacks
)");
extern "C" void fuseformer_switch_stacks(void** saved, void* next);

namespace fuseformer::emulator {

Block block;
std::map<const int*, uint64_t> passers;
Thread* current = nullptr;
Report report;
bool instrumented = false;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 256 << 10;
// Of a kernel's stack, where its registers are kept: what it has not set is a NaN.
constexpr size_t kPoisonedBytes = 8 << 10;

Options the_options;
uint64_t random_state = 1;
void* launcher_stack_pointer = nullptr;
const std::function<void()>* the_kernel = nullptr;
bool gave_up = false;
uint64_t blocks_begun = 0;  // over all launches

// The stacks of threads, for one launch: their guard pages make two mappings of each, of
// which a process may have some ten thousands, and many libraries with an emulator be loaded.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kEach) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count; ++i) {
      // A stack that is full must not run into the next one.
      if (mprotect(memory_ + i * kEach, kPage, PROT_NONE)) {
        munmap(memory_, bytes_);
        throw std::bad_alloc();
      }
    }
  }
  ~Stacks() {
    allow_access(memory_, bytes_);  // what is mapped there next begins without a history
    munmap(memory_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* operator[](size_t i) const { return memory_ + i * kEach + kPage; }

 private:
  static constexpr size_t kEach = kPage + kStackBytes;
  const size_t bytes_;
  char* memory_;
};

void switch_to(Thread* next) {
  Thread* const previous = current;
  current = next;
  fuseformer_switch_stacks(previous ? &previous->stack_pointer : &launcher_stack_pointer,
                           next->stack_pointer);
}

void switch_to_launcher() {
  Thread* const previous = current;
  current = nullptr;
  fuseformer_switch_stacks(&previous->stack_pointer, launcher_stack_pointer);
}

// Takes the next thread that can run out of the warp whose turn it is, or returns null.
Thread* next_ready() {
  Warp* best = nullptr;
  for (Warp& warp : block.warps) {
    if (!warp.ready.empty() && (!best || warp.priority < best->priority)) best = &warp;
  }
  if (!best) return nullptr;
  const size_t chosen =
      the_options.random_schedule ? random_number() % best->ready.size() : best->ready.size() - 1;
  const int number = best->ready[chosen];
  best->ready.erase(best->ready.begin() + chosen);
  return &block.threads[number];
}

void run_thread() {
  (*the_kernel)();
  current->done = true;
  --block.live;
  if (!block.barriers[0].waiting.empty()) {
    give_up("threads wait at a barrier of the block that others have left");
  }
  if (Thread* next = next_ready()) switch_to(next);
  switch_to_launcher();
  __builtin_unreachable();
}

void prepare(Thread& thread, int number, char* stack, const Place& place) {
  thread = Thread();
  thread.number = number;
  thread.place = place;
  // Stacks that begin at the same place of a page would share the same few lines of the cache.
  thread.stack_top = stack + kStackBytes - 64 - number % 16 * 256;
  allow_access(stack, kStackBytes);  // frames that were left, not returned from
  void** top = reinterpret_cast<void**>(thread.stack_top);
  *top = reinterpret_cast<void*>(run_thread);
  thread.stack_pointer = top - 6;
  if (instrumented) {
    thread.clocks.assign(block.threads.size(), 0);
    thread.clocks[number] = 1;
  }
}

void describe_deadlock() {
  const dim3 at = block.threads[0].place.block;
  struct Waiting {
    int count = 0, first = 0;
  };
  std::map<std::string, Waiting> waits;
  for (const Thread& thread : block.threads) {
    if (thread.done) continue;
    Waiting& waiting = waits[thread.waits_for ? thread.waits_for : "nothing"];
    if (waiting.count++ == 0) waiting.first = thread.number;
  }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [what, waiting] : waits) {
    text << " " << waiting.count << " threads wait for " << what << " (the first is thread "
         << waiting.first << ")";
  }
  text << " in block (" << at.x << ", " << at.y << ", " << at.z << ")";
  ++report.errors[text.str()];
}

void begin_block(dim3 grid, dim3 size, dim3 at, size_t shared_bytes, int slot,
                 const Stacks& stacks) {
  const int count = size.x * size.y * size.z;
  block.number = ++blocks_begun;
  block.slot = slot;
  block.live = count;
  block.threads.resize(count);
  block.warps.assign((count + 31) / 32, Warp());
  block.turns.clear();
  block.takes_turns = block.has_sums = false;
  block.shared_bytes = shared_bytes;
  block.shared = new_shared(shared_bytes);
  for (int i = count - 1; i >= 0; --i) {
    const unsigned n = i;
    prepare(block.threads[i], i, stacks[slot * count + i],
            {{n % size.x, n / size.x % size.y, n / (size.x * size.y)}, at, size, grid});
    make_ready(i);
  }
  shuffle_warps();
}

bool has_come(const Awaited& awaited) { return *awaited.counter >= awaited.value; }

bool any_ready(const Block& one) {
  return std::any_of(one.warps.begin(), one.warps.end(),
                     [](const Warp& warp) { return !warp.ready.empty(); });
}

bool can_go_on(const Block& one) {
  return any_ready(one) || std::any_of(one.awaited.begin(), one.awaited.end(), has_come);
}

// Runs the block until it ends, waits for others, or lets them go on.
void go_on() {
  const auto come = std::stable_partition(block.awaited.begin(), block.awaited.end(),
                                          [](const Awaited& a) { return !has_come(a); });
  for (auto i = come; i != block.awaited.end(); ++i) make_ready(i->thread);
  block.awaited.erase(come, block.awaited.end());
  switch_to(next_ready());
  current = nullptr;
  if (block.live && !gave_up) {
    if (any_ready(block) || !block.awaited.empty()) return;
    describe_deadlock();
    gave_up = true;
  }
  for (size_t i = 0; instrumented && i < block.warps.size(); ++i) count_conflicts(i);
  if (!block.turns.empty() && !gave_up) error("a block ends without passing on its turn");
}

// Of a launch that ends where no block can go on.
void describe_awaited(Block& one) {
  const Awaited& awaited = one.awaited[0];
  current = &one.threads[awaited.thread];
  error("the turn " + std::to_string(awaited.value) + " does not come: it is that of " +
        std::to_string(*awaited.counter));
  current = nullptr;
}

bool within_limits(dim3 grid, dim3 size, size_t shared_bytes) {
  const size_t limit = shared_limit();
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  std::ostringstream text;
  if (limit == 0) {
    text << "no such architecture: sm_" << the_options.architecture;
  } else if (threads < 1 || threads > 1024) {
    text << "a block of " << threads << " threads: 1 to 1,024 can be launched";
  } else if (threads % 32) {
    text << "a block of " << threads << " threads: the emulator wants whole warps";
  } else if (shared_bytes > limit) {
    text << shared_bytes << " bytes of shared memory: sm_" << the_options.architecture << " has "
         << limit;
  } else if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
             grid.z > 65535) {
    text << "a grid of " << grid.x << " x " << grid.y << " x " << grid.z << " blocks";
  } else {
    return true;
  }
  ++report.errors["launch: " + text.str()];
  return false;
}

}  // namespace

Options& options() { return the_options; }

int shared_limit() {
  switch (the_options.architecture) {
    case 80:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    default:
      return 0;
  }
}

Report take_report() {
  Report taken;
  std::swap(taken, report);
  return taken;
}

const Place& place() { return current->place; }

uint32_t random_number() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(random_state >> 33);
}

void shuffle_warps() {
  for (size_t i = 0; i < block.warps.size(); ++i) {
    block.warps[i].priority = the_options.random_schedule ? random_number() : i;
  }
}

void make_ready(int thread) { block.warps[thread / 32].ready.push_back(thread); }

void wait(const char* what) {
  current->waits_for = what;
  Thread* const me = current;
  Thread* const next = next_ready();
  if (next == nullptr) {
    switch_to_launcher();
  } else if (next != me) {
    switch_to(next);
  }
  me->waits_for = nullptr;
}

void wait_for(const int* counter, int value) {
  if (*counter >= value) return;
  block.awaited.push_back({current->number, counter, value});
  wait("the turn of its block");
}

void may_let_others_run() {
  if (!options().random_schedule || random_number() % 4) return;
  make_ready(current->number);
  switch_to_launcher();
}

void give_up(const std::string& what, const void* pc) {
  error(what, pc);
  gave_up = true;
  switch_to_launcher();
  __builtin_unreachable();
}

__attribute__((noinline)) void poison_registers() {
  char below[kPoisonedBytes];
  std::memset(below, 0xff, sizeof below);
  asm volatile("" ::"r"(below) : "memory");
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!within_limits(grid, size, shared_bytes)) return;
  the_kernel = &kernel;
  random_state = the_options.seed * 0x9E3779B97F4A7C15ull + 1;
  gave_up = false;
  new_launch(blocks_begun + 1);
  const FaultsAreErrors faults_are_errors;
  passers.clear();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const int most = the_options.random_schedule ? std::min<uint64_t>(kResidentBlocks, blocks) : 1;
  const Stacks stacks(most * size.x * size.y * size.z);
  std::vector<Block> residents(most);  // each where `block` is while it runs
  for (uint64_t next = 0; !gave_up;) {
    std::vector<int> able;
    for (int slot = 0; slot < most; ++slot) {
      const Block& one = residents[slot];
      if (one.live ? can_go_on(one) : next < blocks) able.push_back(slot);
    }
    if (able.empty()) break;
    const int slot = able[able.size() > 1 ? random_number() % able.size() : 0];
    std::swap(block, residents[slot]);
    if (block.live == 0) {
      const unsigned x = next % grid.x, y = next / grid.x % grid.y, z = next / grid.x / grid.y;
      begin_block(grid, size, {x, y, z}, shared_bytes, slot, stacks);
      ++next;
    }
    go_on();
    std::swap(block, residents[slot]);
  }
  for (Block& one : residents) {
    if (one.live && !gave_up) describe_awaited(one);
    std::swap(block, one);
    for (size_t i = 0; instrumented && i < block.warps.size(); ++i) count_conflicts(i);
    std::swap(block, one);
  }
}

}  // namespace fuseformer::emulator
