// The hooks that g++ calls in a kernel compiled with -fsanitize=thread: each plain load and store
// comes by here. The library that usually answers them is not linked. And errors, with their lines.
#include <dlfcn.h>

#include <sstream>
#include <utility>

#include "state.h"

namespace fuseformer::emulator {

void error(const std::string& what, const void* pc, const std::string& detail) {
  static std::map<std::pair<std::string, const void*>, std::string> texts;
  if (report.errors.empty()) texts.clear();  // those of a report that was taken
  std::string& known = texts[{what, pc}];
  if (!known.empty()) {
    ++report.errors[known];
    return;
  }
  std::ostringstream text;
  text << what;
  if (!detail.empty()) text << " (" << detail << ")";
  if (current != nullptr) {
    const dim3 at = current->place.block;
    text << " by thread " << current->number << " of block (" << at.x << ", " << at.y << ", "
         << at.z << ")";
  }
  Dl_info info;
  if (pc != nullptr && dladdr(pc, &info) && info.dli_fbase) {
    // The call, not where it returns to. Whoever reads the report finds the line of the offset.
    const uintptr_t offset =
        reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    text << " at +0x" << std::hex << offset << std::dec;
  }
  known = text.str();
  ++report.errors[known];
}

namespace {

void plain_access(const void* address, size_t bytes, bool writes, const void* pc) {
  if (current == nullptr) return;  // the host's own part of the file
  ++report.counters.accesses;
  check_access(address, bytes, writes ? Access::kWrite : Access::kRead, pc);
  if (in_shared(address, bytes)) note_shared_access(address, bytes, pc);
}

}  // namespace
}  // namespace fuseformer::emulator

#define CALLER __builtin_return_address(0)
#define HOOKS(bytes)                                                                    \
  void __tsan_read##bytes(void* p) { plain_access(p, bytes, false, CALLER); }           \
  void __tsan_write##bytes(void* p) { plain_access(p, bytes, true, CALLER); }           \
  void __tsan_unaligned_read##bytes(void* p) { plain_access(p, bytes, false, CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { plain_access(p, bytes, true, CALLER); } \
  void __tsan_volatile_read##bytes(void* p) { plain_access(p, bytes, false, CALLER); }  \
  void __tsan_volatile_write##bytes(void* p) { plain_access(p, bytes, true, CALLER); }

extern "C" {

using fuseformer::emulator::instrumented;
using fuseformer::emulator::plain_access;

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_init() { instrumented = true; }
void __tsan_read_range(void* p, size_t bytes) { plain_access(p, bytes, false, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { plain_access(p, bytes, true, CALLER); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* target, const void* source, size_t bytes) {
  plain_access(source, bytes, false, CALLER);
  plain_access(target, bytes, true, CALLER);
  return std::memcpy(target, source, bytes);
}
void* __tsan_memset(void* target, int value, size_t bytes) {
  plain_access(target, bytes, true, CALLER);
  return std::memset(target, value, bytes);
}

}  // extern "C"
