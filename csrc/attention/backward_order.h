// The order in which the blocks of a backward launch take their steps and add to dq.
//
// A block owns kBlockN keys of one key head and visits tiles of kBlockM queries that see them, of
// all query heads that share the keys. It visits them by descending query, and within a tile of
// rows by descending head. So the tiles on the diagonal of a causal mask come last, and the blocks
// of a head, which begin together, reach each tile in ascending order of their keys: the order of
// the sums of dq. No block waits for one that has more to do before it gets there. With the
// diagonal first, each block would wait for the one before it to end; with one head after the
// other, blocks that see few queries would wait for those that see many.
//
// `python -m bench schedule` reads this order through the emulator and models whole launches.
#pragma once

#include "mask.h"

namespace fuseformer {

// The visits of a block, from `begin` up to `end`, which go downwards: visit v is of the tile
// v / group, and of the head v % group of those that share the keys. Those from `full_begin` up to
// `full_end` hide nothing.
using Visits = Steps;

template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE Visits query_visits(const AttentionParams& params, const Sequence& s, int key) {
  Visits visits = query_steps<kBlockM, kBlockN>(params, s, key);
  visits.begin *= params.group;
  visits.full_begin *= params.group;
  visits.full_end *= params.group;
  visits.end *= params.group;
  return visits;
}

// Calls `take(masked, visit, next)` for each visit in its order, `next` being -1 for the last one.
// Only rows of the first tile may not exist. `visits` returns where they are kept.
template <typename Function, typename Kept>
FUSEFORMER_DEVICE void for_each_visit(const Kept& visits, Function&& take) {
  const auto after = [&](int visit) { return visit > visits().begin ? visit - 1 : -1; };
  int visit = visits().count() > 0 ? visits().end - 1 : -1;
  while (visit >= 0) {
    if (visits().is_full(visit)) {
      do {
        take(Constant<false>(), visit, after(visit));
        visit = after(visit);
      } while (visit >= visits().full_begin);
    } else {
      take(Constant<true>(), visit, after(visit));
      visit = after(visit);
    }
  }
}

// How many blocks of keys add to dq of a tile of queries before this one: those of smaller keys
// that the tile sees.
template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE int turn_of(const AttentionParams& params, const Sequence& s, int key, int step) {
  const int first = maximum(0, step * kBlockM + s.diagonal - params.window_left) / kBlockN;
  return key / kBlockN - first;
}

}  // namespace fuseformer
