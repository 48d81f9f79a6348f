// Global and shared memory with exact bounds, and the state of each word: who wrote and read it.
//
// Both kinds lie in one reserved range of addresses, with gaps between allocations: an access that
// misses its allocation by less than a gap is seen for what it is, and harms nobody.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <new>

#include "../device/platform.h"
#include "sanitizer.h"
#include "state.h"

namespace fuseformer::emulator {
namespace {

constexpr size_t kReserved = size_t{1} << 36;
constexpr size_t kGap = 64 << 10;
constexpr size_t kSharedSpace = 1 << 20;
constexpr size_t kWord = 4;
constexpr uint8_t kAllBytes = 0xf;

// What is known of four bytes. A clock of 0 is no access; blocks are numbered over all launches.
struct Word {
  uint32_t write_clock = 0;
  uint32_t read_clock = 0;
  uint64_t write_block = 0;
  uint64_t read_block = 0;
  uint64_t other_read_block = 0;  // that has read it before this one did
  int32_t writer = 0;
  int32_t reader = 0;
  std::unique_ptr<Clocks> readers;  // of this block, where there is more than one
  uint16_t copies_on_the_way = 0;
  uint8_t initialised = 0;  // a bit a byte
  bool atomic = false;      // the last write was an atomic sum
};

struct Allocation {
  char* begin;
  size_t bytes;
  std::vector<Word> words;
};

char* arena = nullptr;
char* next_free = nullptr;
char* shared_begin = nullptr;
std::map<char*, Allocation> allocations;  // by their first address
Allocation shared_of[kResidentBlocks];
Allocation* last_found = nullptr;
uint64_t first_block_of_launch = 1;

void reserve() {
  if (arena != nullptr) return;
  arena = static_cast<char*>(mmap(nullptr, kReserved, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (arena == MAP_FAILED) {
    arena = nullptr;
    throw std::bad_alloc();
  }
  shared_begin = arena + kGap;
  next_free = shared_begin + kResidentBlocks * kSharedSpace + kGap;
}

// The shared memory of the block that is running.
Allocation& shared() { return shared_of[block.slot]; }

bool holds(const Allocation& allocation, const char* address) {
  return address >= allocation.begin && address < allocation.begin + allocation.bytes;
}

Allocation* find(const char* address) {
  if (holds(shared(), address)) return &shared();
  if (last_found != nullptr && holds(*last_found, address)) return last_found;
  auto after = allocations.upper_bound(const_cast<char*>(address));
  if (after == allocations.begin()) return nullptr;
  Allocation& candidate = std::prev(after)->second;
  if (!holds(candidate, address)) return nullptr;
  last_found = &candidate;
  return last_found;
}

const char* kind_of(const Allocation& allocation) {
  return &allocation == &shared() ? "shared memory" : "global memory";
}

std::string thread_name(int number) { return "thread " + std::to_string(number); }

// Whether the running thread has seen what happened at `clock` of `thread` in `block_number`.
bool has_seen(uint64_t block_number, int thread, uint32_t clock) {
  if (clock == 0 || block_number < first_block_of_launch) return true;
  return block_number == block.number &&
         (thread == current->number || clock <= current->clocks[thread]);
}

void check_races(Word& word, Access access, const std::string& where, const void* pc) {
  const bool reads = access == Access::kRead, atomic = access == Access::kAtomic;
  const char* does = reads ? "read" : "write";
  if (!(atomic && word.atomic) && !has_seen(word.write_block, word.writer, word.write_clock)) {
    const bool inside = word.write_block == block.number;
    error("race: " + std::string(does) + " of " + where + " that another " +
              (inside ? "thread" : "block") + " writes",
          pc, inside ? thread_name(word.writer) : "");
  }
  if (reads) return;
  bool seen = has_seen(word.read_block, word.reader, word.read_clock);
  int other = word.reader;
  if (word.readers && word.read_block == block.number) {
    for (size_t i = 0; i < word.readers->size(); ++i) {
      if (!has_seen(block.number, i, (*word.readers)[i])) seen = false, other = i;
    }
  }
  const bool inside = !seen && word.read_block == block.number;
  if (!has_seen(word.other_read_block, 0, 1)) seen = false;
  if (!seen) {
    error("race: write of " + where + " that another " + (inside ? "thread" : "block") + " reads",
          pc, inside ? thread_name(other) : "");
  }
}

void remember(Word& word, Access access, uint8_t bytes) {
  const uint32_t clock = current->clocks[current->number];
  if (access != Access::kRead) {
    word.write_clock = clock;
    word.write_block = block.number;
    word.writer = current->number;
    word.read_clock = 0;
    word.other_read_block = 0;
    word.readers.reset();
    word.initialised |= bytes;
    word.atomic = access == Access::kAtomic;
    return;
  }
  // The read of another block is kept beside that of this one: either races with a write.
  if (word.read_clock != 0 && word.read_block != block.number) {
    word.other_read_block = word.read_block;
  }
  const bool others =
      word.read_clock != 0 && word.read_block == block.number && word.reader != current->number;
  if (others && !word.readers) {
    word.readers = std::make_unique<Clocks>(block.threads.size(), 0);
    (*word.readers)[word.reader] = word.read_clock;
  }
  if (word.readers && word.read_block == block.number) {
    (*word.readers)[current->number] = clock;
  } else {
    word.readers.reset();
  }
  word.read_clock = clock;
  word.read_block = block.number;
  word.reader = current->number;
}

}  // namespace

void* allocate(size_t bytes, const void* initial) {
  reserve();
  char* const begin = next_free;
  if (bytes > static_cast<size_t>(arena + kReserved - begin) - 2 * kGap) throw std::bad_alloc();
  next_free += (bytes + kGap + 255) / 256 * 256;
  allow_access(begin, bytes);
  forbid_access(begin + bytes, next_free - begin - bytes);
  Allocation allocation{begin, bytes, {}};
  if (instrumented) allocation.words.resize((bytes + kWord - 1) / kWord);
  if (initial != nullptr) {
    std::memcpy(begin, initial, bytes);
    for (Word& word : allocation.words) word.initialised = kAllBytes;
  } else {
    std::memset(begin, 0xff, bytes);  // a NaN in every format
  }
  allocations.emplace(begin, std::move(allocation));
  return begin;
}

void release_all() {
  last_found = nullptr;
  allocations.clear();
  if (arena == nullptr) return;
  next_free = shared_begin + kResidentBlocks * kSharedSpace + kGap;
}

char* new_shared(size_t bytes) {
  reserve();
  char* const begin = shared_begin + block.slot * kSharedSpace;
  allow_access(begin, bytes);
  forbid_access(begin + bytes, kSharedSpace - bytes);
  std::memset(begin, 0xff, bytes);
  shared().begin = begin;
  shared().bytes = bytes;
  shared().words.clear();
  if (instrumented) shared().words.resize((bytes + kWord - 1) / kWord);
  return begin;
}

void new_launch(uint64_t first_block) { first_block_of_launch = first_block; }

bool in_shared(const void* address, size_t bytes) {
  const char* first = static_cast<const char*>(address);
  return holds(shared(), first) && first + bytes <= shared().begin + shared().bytes;
}

bool in_global(const void* address, size_t bytes) {
  const char* first = static_cast<const char*>(address);
  const Allocation* found = find(first);
  return found != nullptr && found != &shared() && first + bytes <= found->begin + found->bytes;
}

void check_access(const void* address, size_t bytes, Access access, const void* pc) {
  const char* first = static_cast<const char*>(address);
  // What lies elsewhere is a thread's own: its stack, and the parameters of the kernel.
  if (first < arena || first >= arena + kReserved) return;
  const bool reads = access == Access::kRead;
  Allocation* const found = find(first);
  if (found == nullptr || first + bytes > found->begin + found->bytes) {
    error(std::string("out of bounds: ") + (reads ? "read" : "write") + " of " +
              std::to_string(bytes) + " bytes beside all allocations",
          pc);
    return;
  }
  const std::string where = kind_of(*found);
  // Nothing larger than sixteen bytes is one instruction.
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(first) % bytes) {
    error("misaligned access to " + where, pc);
  }
  if (found->words.empty()) return;
  for (size_t done = 0; done < bytes;) {
    const size_t offset = first + done - found->begin, in_word = offset % kWord;
    const size_t count = std::min(kWord - in_word, bytes - done);
    const uint8_t touched = ((1u << count) - 1) << in_word;
    Word& word = found->words[offset / kWord];
    const bool copy = access == Access::kCopyBegins || access == Access::kCopyLands;
    if (access == Access::kCopyLands) --word.copies_on_the_way;
    if (word.copies_on_the_way && !copy) {
      error(std::string(reads ? "read" : "write") + " where an asynchronous copy is on its way",
            pc);
    }
    // Which of two copies lands last is not known, not even to the thread that began both.
    if (word.copies_on_the_way && access == Access::kCopyBegins) {
      error("asynchronous copy to where another is on its way", pc);
    }
    if ((reads || access == Access::kAtomic) && (word.initialised & touched) != touched) {
      error("read of " + where + " that nobody has written", pc);
    }
    check_races(word, access, where, pc);
    remember(word, access, touched);
    if (access == Access::kCopyBegins) ++word.copies_on_the_way;
    done += count;
  }
}

}  // namespace fuseformer::emulator

namespace fuseformer {

SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(static_cast<const char*>(pointer) - emulator::block.shared);
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(emulator::block.shared); }

}  // namespace fuseformer
