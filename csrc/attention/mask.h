// Which keys a block of queries sees, and which steps hide any.
#pragma once

#include "../device/warp.h"
#include "params.h"

namespace fuseformer {

// The sequence of a batch entry, and its place in the tensors.
struct Sequence {
  int first_query;  // row of the tensors; 0 unless packed
  int first_key;
  int queries;
  int keys;
  int key_end;   // keys at or past it are padding
  int diagonal;  // query i is aligned with key i + diagonal
};

FUSEFORMER_DEVICE Sequence sequence_of(const AttentionParams& params, int batch) {
  Sequence s{0, 0, params.queries, params.keys, 0, 0};
  if (params.cu_seqlens_q != nullptr) {
    s.first_query = params.cu_seqlens_q[batch];
    s.first_key = params.cu_seqlens_k[batch];
    s.queries = params.cu_seqlens_q[batch + 1] - s.first_query;
    s.keys = params.cu_seqlens_k[batch + 1] - s.first_key;
  }
  s.key_end = s.keys;
  if (params.bottom_right) s.diagonal = s.keys - s.queries;
  if (params.key_lengths != nullptr) {
    s.key_end = maximum(0, minimum(s.keys, params.key_lengths[batch]));
    // Not once for both: registers are spilled at head dim 256.
    if (params.bottom_right) s.diagonal = s.key_end - s.queries;
  }
  return s;
}

// The steps that a block takes over keys or over queries, in the order that it takes them: those
// that hide something, or reach past the end, the last one first, then those that do neither, the
// last one first. What hides everything is not among them. So only the first step can reach past
// the end.
struct Steps {
  int begin;       // first step of the visible ones
  int full_begin;  // first step that hides nothing
  int full_end;
  int end;

  FUSEFORMER_DEVICE int masked() const { return end - full_end + full_begin - begin; }
  FUSEFORMER_DEVICE int count() const { return end - begin; }

  FUSEFORMER_DEVICE bool is_full(int step) const { return step >= full_begin && step < full_end; }

  // The step that is taken at place `index`.
  FUSEFORMER_DEVICE int at(int index) const {
    const int step = end - 1 - index;
    if (step >= full_end) return step;
    return index < masked() ? step - (full_end - full_begin) : step + full_begin - begin;
  }
};

// Steps of kSize from the range that is seen in part, and the one that is seen by all.
template <int kSize>
FUSEFORMER_DEVICE Steps steps_of(int seen_begin, int seen_end, int all_begin, int all_end) {
  Steps steps;
  steps.begin = maximum(seen_begin, 0) / kSize;
  steps.end = maximum(steps.begin, (seen_end + kSize - 1) / kSize);
  steps.full_begin = minimum(steps.end, (maximum(all_begin, 0) + kSize - 1) / kSize);
  steps.full_end = maximum(steps.full_begin, minimum(steps.end, maximum(all_end, 0) / kSize));
  if (seen_end <= maximum(seen_begin, 0))
    steps.begin = steps.full_begin = steps.full_end = steps.end;
  return steps;
}

// The steps over keys of the block of queries that begins at `row`.
template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE Steps key_steps(const AttentionParams& params, const Sequence& s, int row) {
  const int first = row + s.diagonal;
  const int last = minimum(row + kBlockM, s.queries) - 1 + s.diagonal;
  return steps_of<kBlockN>(
      first - params.window_left, minimum(s.key_end, last + params.window_right + 1),
      last - params.window_left, minimum(s.key_end, first + params.window_right + 1));
}

// The steps over queries of the block of keys that begins at `key`. One that holds padded keys
// hides them in every step.
template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE Steps query_steps(const AttentionParams& params, const Sequence& s, int key) {
  const int first = key - s.diagonal;
  const int last = minimum(key + kBlockN, s.key_end) - 1 - s.diagonal;
  const int seen_end = minimum(s.queries, last + params.window_left + 1);
  const bool padded = key + kBlockN > s.key_end;
  return steps_of<kBlockM>(first - params.window_right, last < first ? 0 : seen_end,
                           last - params.window_right,
                           padded ? 0 : minimum(s.queries, first + params.window_left + 1));
}

// The keys that one row sees, from `begin` up to `end`.
struct VisibleKeys {
  int begin;
  int end;

  FUSEFORMER_DEVICE VisibleKeys(const AttentionParams& params, const Sequence& s, int row) {
    begin = row + s.diagonal - params.window_left;
    end = minimum(s.key_end, row + s.diagonal + params.window_right + 1);
  }

  FUSEFORMER_DEVICE bool holds(int key) const { return key >= begin && key < end; }
};

// Hides what sixteen rows do not see; `row` and `key` are the lane's first ones.
template <int kKeyTiles>
FUSEFORMER_DEVICE void hide(float (&products)[kKeyTiles][4], const AttentionParams& params,
                            const Sequence& sequence, int row, int key) {
  FUSEFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const VisibleKeys visible(params, sequence, row + 8 * half);
    FUSEFORMER_UNROLL
    for (int i = 0; i < kKeyTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (!visible.holds(key + 8 * i + j)) products[i][2 * half + j] = kMinusInfinity;
      }
    }
  }
}

}  // namespace fuseformer
