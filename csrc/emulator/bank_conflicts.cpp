// How often the lanes of a warp get in each other's way in shared memory, at plain loads and
// stores.
//
// Memory has 32 banks of four bytes. An instruction of the warp is served a bank row of 128 bytes
// at a time: all lanes at once if they want four bytes each, half of them for eight, a quarter for
// sixteen. It takes as many cycles as there are different words in one bank.
#include <algorithm>
#include <map>
#include <utility>

#include "state.h"

namespace fuseformer::emulator {
namespace {

constexpr int kBanks = 32;

// What the lanes did at one instruction, all for the same time since they were last together.
struct Instruction {
  size_t bytes = 0;
  std::vector<std::pair<int, size_t>> lanes;  // and their offsets in shared memory
};

struct Log {
  std::map<std::pair<const void*, uint32_t>, Instruction> instructions;
  std::map<std::pair<const void*, int>, uint32_t> times;  // of each instruction and lane
};

std::map<int, Log> logs[kResidentBlocks];  // by warp

uint64_t conflicts_of(const Instruction& instruction) {
  const size_t words = std::max<size_t>(1, instruction.bytes / 4);
  const int lanes_at_once = static_cast<int>(kBanks / words);
  uint64_t conflicts = 0;
  for (int first = 0; first < 32; first += lanes_at_once) {
    std::vector<size_t> wanted;
    for (const auto& [lane, offset] : instruction.lanes) {
      if (lane < first || lane >= first + lanes_at_once) continue;
      for (size_t i = 0; i < words; ++i) wanted.push_back(offset / 4 + i);
    }
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    int cycles[kBanks] = {}, most = 0;
    for (size_t word : wanted) most = std::max(most, ++cycles[word % kBanks]);
    if (most > 1) conflicts += most - 1;
  }
  return conflicts;
}

}  // namespace

void note_shared_access(const void* address, size_t bytes, const void* pc) {
  if (bytes > 16) return;  // not one instruction
  Log& log = logs[block.slot][current->number / 32];
  const int lane = current->number % 32;
  Instruction& instruction = log.instructions[{pc, log.times[{pc, lane}]++}];
  instruction.bytes = bytes;
  instruction.lanes.emplace_back(lane, static_cast<const char*>(address) - block.shared);
}

void count_conflicts(int warp) {
  std::map<int, Log>& of_block = logs[block.slot];
  const auto found = of_block.find(warp);
  if (found == of_block.end()) return;
  for (const auto& [place, instruction] : found->second.instructions) {
    report.counters.shared_conflicts += conflicts_of(instruction);
  }
  of_block.erase(found);
}

}  // namespace fuseformer::emulator
