// The order in which the blocks of a backward launch take their tiles and add to dq.
//
// A block owns kBlockN keys of one key head and visits tiles of kBlockM queries that see them, of
// all query heads that share the keys. It visits them by descending query, and within a tile of
// rows by descending head. So the tiles on the diagonal of a causal mask come last, and the blocks
// of a head, which begin together, reach each tile in ascending order of their keys: the order of
// the sums of dq. No block waits for one that has more to do before it gets there. With the
// diagonal first, each block would wait for the one before it to end; with one head after the
// other, blocks that see few queries would wait for those that see many.
//
// A block waits for blocks of smaller keys alone, which lie before it in the grid. GPUs start
// blocks in the order of the grid, so whoever is waited for has begun, and the one of the smallest
// key among those that run waits for nobody. CUDA does not promise that order; where it did not
// hold, a wait would end in a trap (`wait_for_turn`), never in a wrong sum.
#pragma once

#include "mask.h"

namespace fuseformer {

struct Visits {
  int group;
  // First visits of the tiles that are seen, of those that nothing is hidden of, and the ends.
  int begin;
  int full_begin;
  int full_end;
  int end;

  FUSEFORMER_DEVICE bool any() const { return end > begin; }
  FUSEFORMER_DEVICE bool is_full(int visit) const {
    return visit >= full_begin && visit < full_end;
  }
  FUSEFORMER_DEVICE int first() const { return end - kMostMembers + group - 1; }
  // The visit after this one, or -1.
  FUSEFORMER_DEVICE int after(int visit) const {
    const int next = visit & (kMostMembers - 1) ? visit - 1 : visit - kMostMembers + group - 1;
    return next >= begin ? next : -1;
  }
};

template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE Visits query_visits(const AttentionParams& params, const Sequence& s, int key) {
  const Steps tiles = query_steps<kBlockM, kBlockN>(params, s, key);
  return {params.group, tiles.begin << kMemberBits, tiles.full_begin << kMemberBits,
          tiles.full_end << kMemberBits, tiles.end << kMemberBits};
}

// Calls `take(masked, visit, next)` for each visit in its order, `next` being -1 for the last one.
// Only rows of the first tile may not exist. `visits` returns where they are kept.
template <typename Function, typename Kept>
FUSEFORMER_DEVICE void for_each_visit(const Kept& visits, Function&& take) {
  int visit = visits().any() ? visits().first() : -1;
  while (visit >= 0) {
    if (visits().is_full(visit)) {
      do {
        take(Constant<false>(), visit, visits().after(visit));
        visit = visits().after(visit);
      } while (visit >= visits().full_begin);
    } else {
      do {
        take(Constant<true>(), visit, visits().after(visit));
        visit = visits().after(visit);
      } while (visit >= 0 && !visits().is_full(visit));
    }
  }
}

// How many blocks of keys add to dq of a tile of queries before this one: those of smaller keys
// that the tile sees.
template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE int turn_of(const AttentionParams& params, const Sequence& s, int key, int tile) {
  const int first = maximum(0, tile * kBlockM + s.diagonal - params.window_left) / kBlockN;
  return key / kBlockN - first;
}

}  // namespace fuseformer
