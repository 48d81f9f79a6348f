// Barriers of blocks and warps, and what threads have seen of each other behind them.
#include <algorithm>
#include <string>
#include <utility>

#include "../device/platform.h"
#include "state.h"

namespace fuseformer::emulator {

void join_clocks(const std::vector<int>& joined) {
  if (!instrumented) return;
  Clocks seen(block.threads.size(), 0);
  for (int number : joined) {
    const Clocks& clocks = block.threads[number].clocks;
    for (size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], clocks[i]);
  }
  for (int number : joined) {
    block.threads[number].clocks = seen;
    ++block.threads[number].clocks[number];
  }
}

}  // namespace fuseformer::emulator

namespace fuseformer {

using namespace emulator;

void named_barrier(int id, int threads) {
  const int size = static_cast<int>(block.threads.size());
  if (id < 0 || id > 15 || threads <= 0 || threads > size || threads % 32) {
    give_up("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads");
  }
  Barrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && barrier.expected != threads) {
    give_up("barrier " + std::to_string(id) + " of " + std::to_string(threads) +
            " threads, where others wait for " + std::to_string(barrier.expected));
  }
  barrier.expected = threads;
  ++report.counters.barriers;
  if (threads == size) current->has_sums = false;
  barrier.waiting.push_back(current->number);
  if (static_cast<int>(barrier.waiting.size()) < threads) {
    wait(id ? "a named barrier" : "a barrier of the block");
    return;
  }
  const std::vector<int> arrived = std::move(barrier.waiting);
  barrier.waiting.clear();
  join_clocks(arrived);
  if (threads == size && instrumented) {
    for (size_t i = 0; i < block.warps.size(); ++i) count_conflicts(i);
  }
  for (int number : arrived) {
    if (number != current->number) make_ready(number);
  }
  shuffle_warps();
  if (options().random_schedule) {
    make_ready(current->number);
    wait("its turn");
    may_let_others_run();
  }
}

void block_barrier() {
  if (block.live != static_cast<int>(block.threads.size())) {
    give_up("a barrier of the block, which other threads have left");
  }
  named_barrier(0, block.live);
}

void warp_barrier() {
  int nothing = 0;
  collective("a barrier of the warp", nothing, [](int**) {
    std::vector<int> lanes;
    for (int i = 0; i < 32; ++i) lanes.push_back(current->number / 32 * 32 + i);
    join_clocks(lanes);
  });
}

}  // namespace fuseformer
