// What the backward kernels share: the block of keys that a block owns, its visits to queries, and
// how dk and dv leave it.
//
// Their sums leave few registers. What a step does not need is computed again where it is used.
#pragma once

#include "../device/atomic.h"
#include "../device/philox.h"
#include "../device/tile.h"
#include "backward_order.h"
#include "traits.h"
#include "workspace.h"

namespace fuseformer {

struct KeyBlock {
  int batch;
  int kv_head;
  int key;  // the first one, in its sequence
  Sequence sequence;

  // Row `first_row` of a tensor for `head`.
  FUSEFORMER_DEVICE char* rows_of(const HeadTensor& tensor, int head, int first_row) const {
    return static_cast<char*>(tensor.data) +
           2 * (batch * tensor.batch_stride + head * tensor.head_stride +
                first_row * tensor.row_stride);
  }
};

// Of a grid of (key blocks * key heads * batch,), key blocks fastest.
template <int kBlockN>
FUSEFORMER_DEVICE KeyBlock key_block(const AttentionParams& params) {
  uint32_t index = blockIdx.x, keys = params.keys, heads = params.heads;
  compute_again(index);
  compute_again(keys);
  compute_again(heads);
  const uint32_t blocks = (keys + kBlockN - 1) / kBlockN, kv_heads = heads / params.group;
  KeyBlock block;
  block.batch = index / (blocks * kv_heads);
  block.kv_head = index / blocks % kv_heads;
  block.key = index % blocks * kBlockN;
  block.sequence = sequence_of(params, block.batch);
  return block;
}

// The visits of a block of keys. What they have in common is kept in registers or, where the sums
// leave none, in shared memory at `kPlace`: one thread writes it, a visit reads what it needs.
template <typename Traits, int kPlace, bool kShared>
struct QueryVisits {
  static constexpr int kBlockM = Traits::kBlockM;

  struct Kept {
    KeyBlock block;
    int work_step;  // the first tile of the sequence and of its first head in the workspaces
    const char* q_rows;
    const char* dout_rows;
    Visits visits;
    PhiloxKey seed;  // of dropout
    int added_to;    // the last visit whose dq has been added, or -1
  };
  static_assert(sizeof(Kept) <= kKeptBytes && kPlace % alignof(Kept) == 0);

  const AttentionGradientParams& given;
  Kept at;

  FUSEFORMER_DEVICE explicit QueryVisits(const AttentionGradientParams& all) : given(all) {
    const AttentionParams& params = all.forward;
    at.block = key_block<Traits::kBlockN>(params);
    const Sequence& sequence = at.block.sequence;
    const int first_head = at.block.kv_head * params.group;
    at.work_step = first_head * (all.workspace_rows / kBlockM) +
                   workspace_row<kBlockM>(params, at.block.batch) / kBlockM;
    at.q_rows = at.block.rows_of(params.q, first_head, sequence.first_query);
    at.dout_rows = at.block.rows_of(all.dout, first_head, sequence.first_query);
    at.visits = query_visits<kBlockM, Traits::kBlockN>(params, sequence, at.block.key);
    at.seed = params.seed == nullptr ? PhiloxKey{0, 0} : seed_of(params.seed);
    at.added_to = -1;
    if constexpr (kShared) {
      if (threadIdx.x == 0) place() = at;
      block_barrier();
    }
  }

  FUSEFORMER_DEVICE const Kept& kept() const {
    if constexpr (kShared) return place();
    return at;
  }

  // Computed again wherever they are used: between, there are no registers for them.
  FUSEFORMER_DEVICE static int step(uint32_t visit) {
    if constexpr (kShared) compute_again(visit);
    return visit >> kMemberBits;
  }
  FUSEFORMER_DEVICE static int member(uint32_t visit) {
    if constexpr (kShared) compute_again(visit);
    return visit & (kMostMembers - 1);
  }
  FUSEFORMER_DEVICE int head(int visit) const {
    return kept().block.kv_head * given.forward.group + member(visit);
  }

  // Only the first thread of the block passes turns: for it alone is what it has added to.
  FUSEFORMER_DEVICE void pass_last_turn() const {
    if (given.dq_turns == nullptr || threadIdx.x != 0) return;
    if (const int visit = kept().added_to; visit >= 0) pass_turn(turns(visit));
  }
  FUSEFORMER_DEVICE void has_added_to(int visit) {
    if constexpr (!kShared) {
      at.added_to = visit;
    } else if (threadIdx.x == 0) {
      place().added_to = visit;
    }
  }

  // What counts the blocks that have added to dq of a tile, and how many go before this one.
  FUSEFORMER_DEVICE int* turns(int visit) const { return given.dq_turns + tile(visit); }
  FUSEFORMER_DEVICE int turn(int visit) const {
    const KeyBlock& block = kept().block;
    return turn_of<kBlockM, Traits::kBlockN>(given.forward, block.sequence, block.key, step(visit));
  }

  // Where a thread adds to dq of a tile: its sums lie a block's number of threads apart.
  FUSEFORMER_DEVICE float* sums(int visit) const {
    return given.dq_sums + int64_t{kBlockM * Traits::kHeadDim} * tile(visit) + threadIdx.x;
  }

  // Begin the copies of a visit: rows, of which only those of the first tile may not exist, and
  // the numbers of each row.
  template <bool kBounded>
  FUSEFORMER_DEVICE void begin_queries(SharedAddress rows, SharedAddress lse, int visit) const {
    begin<kBounded>(given.forward.q, kept().q_rows, rows, given.lse_log2, lse, visit);
  }
  template <bool kBounded>
  FUSEFORMER_DEVICE void begin_dout(SharedAddress rows, SharedAddress delta, int visit) const {
    begin<kBounded>(given.dout, kept().dout_rows, rows, given.delta, delta, visit);
  }

  // Calls `take(masked, visit, next)` for each visit in its order.
  template <typename Function>
  FUSEFORMER_DEVICE void for_each(Function&& take) const {
    for_each_visit([this]() -> const Visits& { return kept().visits; }, take);
  }

 private:
  FUSEFORMER_DEVICE static Kept& place() {
    return *reinterpret_cast<Kept*>(dynamic_shared() + kPlace);
  }

  // The tile of a visit in the workspaces.
  FUSEFORMER_DEVICE int tile(int visit) const {
    uint32_t rows = given.workspace_rows;
    if constexpr (kShared) compute_again(rows);
    return kept().work_step + member(visit) * static_cast<int>(rows / kBlockM) + step(visit);
  }

  template <bool kBounded>
  FUSEFORMER_DEVICE void begin(const HeadTensor& tensor, const char* from, SharedAddress rows,
                               const float* values, SharedAddress row_values, int visit) const {
    const int thread = thread_again<Traits::kThreads>();
    const TileCopy<Traits::kHeadDim, kBlockM, Traits::kThreads> copy(thread, tensor.row_stride);
    from += 2 * (step(visit) * kBlockM * tensor.row_stride + member(visit) * tensor.head_stride);
    if constexpr (kBounded) {
      copy.begin_bounded(rows, from, kept().block.sequence.queries - step(visit) * kBlockM);
    } else {
      copy.begin(rows, from);
    }
    if (thread < kBlockM / 4) {
      copy_async_16(row_values + thread * 16, values + int64_t{kBlockM} * tile(visit) + thread * 4);
    }
  }
};

// Writes dk and dv, which lie in shared memory as keys do, dv `dv_offset` bytes behind dk.
template <typename Traits>
FUSEFORMER_DEVICE void write_key_gradients(const AttentionGradientParams& given, int dv_offset) {
  using Layout = Tile<Traits::kHeadDim>;
  const KeyBlock block = key_block<Traits::kBlockN>(given.forward);
  const int first = block.sequence.first_key + block.key;
  char* dk_rows = block.rows_of(given.dk, block.kv_head, first);
  char* dv_rows = block.rows_of(given.dv, block.kv_head, first);
  for (int chunk = threadIdx.x; chunk < Traits::kBlockN * Layout::kChunks;
       chunk += Traits::kThreads) {
    const int row = chunk / Layout::kChunks, column = chunk % Layout::kChunks;
    if (block.key + row < block.sequence.keys) {
      const unsigned char* from = dynamic_shared() + Layout::offset(row, column);
      copy_16(dk_rows + 2 * row * given.dk.row_stride + 16 * column, from);
      copy_16(dv_rows + 2 * row * given.dv.row_stride + 16 * column, from + dv_offset);
    }
  }
}

}  // namespace fuseformer
