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
  if (params.key_lengths != nullptr) {
    s.key_end = maximum(0, minimum(s.keys, params.key_lengths[batch]));
  }
  if (params.bottom_right) s.diagonal = s.keys - s.queries;
  return s;
}

// The steps of kBlockN keys that a block of queries takes, in the order that it takes them: those
// that hide some keys from some of its rows, the last one first, then those that hide none. Steps
// that hide all keys are not among them.
template <int kBlockM, int kBlockN>
struct KeySteps {
  int begin;       // first step of the visible ones
  int full_begin;  // first step that hides nothing
  int full_end;
  int end;

  FUSEFORMER_DEVICE KeySteps(const AttentionParams& params, const Sequence& s, int row) {
    const int last_row = minimum(row + kBlockM, s.queries) - 1;
    const int seen_end = minimum(s.key_end, last_row + s.diagonal + params.window_right + 1);
    const int seen_begin = maximum(0, row + s.diagonal - params.window_left);
    const int all_end = maximum(0, minimum(s.key_end, row + s.diagonal + params.window_right + 1));
    const int all_begin = maximum(0, last_row + s.diagonal - params.window_left);
    begin = seen_begin / kBlockN;
    end = maximum(begin, (seen_end + kBlockN - 1) / kBlockN);
    full_begin = minimum(end, (all_begin + kBlockN - 1) / kBlockN);
    full_end = maximum(full_begin, minimum(end, all_end / kBlockN));
    if (seen_end <= seen_begin) begin = full_begin = full_end = end;
  }

  FUSEFORMER_DEVICE int masked() const { return end - full_end + full_begin - begin; }
  FUSEFORMER_DEVICE int count() const { return end - begin; }

  // The step that is taken at place `index`.
  FUSEFORMER_DEVICE int at(int index) const {
    const int step = end - 1 - index;
    if (step >= full_end) return step;
    const int full = full_end - full_begin;
    return index < masked() ? step - full : step + full_begin - begin;
  }
};

// The steps of kBlockM queries that a block of keys takes, in the order that it takes them: those
// that hide some of its keys from some of their rows, or reach past the last row, the first one
// first; then those that do neither. Steps that see none of the keys are not among them.
template <int kBlockM, int kBlockN>
struct QuerySteps {
  int begin;
  int full_begin;
  int full_end;
  int end;

  FUSEFORMER_DEVICE QuerySteps(const AttentionParams& params, const Sequence& s, int key) {
    const int last_key = minimum(key + kBlockN, s.key_end) - 1;
    const int seen_begin = maximum(0, key - s.diagonal - params.window_right);
    const int seen_end = minimum(s.queries, last_key - s.diagonal + params.window_left + 1);
    const int all_begin = maximum(0, last_key - s.diagonal - params.window_right);
    const int all_end = maximum(0, minimum(s.queries, key - s.diagonal + params.window_left + 1));
    begin = seen_begin / kBlockM;
    end = maximum(begin, (seen_end + kBlockM - 1) / kBlockM);
    full_begin = minimum(end, (all_begin + kBlockM - 1) / kBlockM);
    full_end = maximum(full_begin, minimum(end, all_end / kBlockM));
    if (key + kBlockN > s.key_end) full_begin = full_end = end;
    if (seen_end <= seen_begin || last_key < key) begin = full_begin = full_end = end;
  }

  FUSEFORMER_DEVICE int masked() const { return end - full_end + full_begin - begin; }
  FUSEFORMER_DEVICE int count() const { return end - begin; }

  // The step that is taken at place `index`.
  FUSEFORMER_DEVICE int at(int index) const {
    const int step = begin + index;
    if (step < full_begin) return step;
    return index < masked() ? step + full_end - full_begin : full_begin + index - masked();
  }
};

// How many blocks of keys before this one take a step of queries: they add to its dq in their
// order.
template <int kBlockM, int kBlockN>
FUSEFORMER_DEVICE int turn_of(const AttentionParams& params, const Sequence& s, int key, int step) {
  const int first = maximum(0, step * kBlockM + s.diagonal - params.window_left) / kBlockN;
  return key / kBlockN - first;
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

}  // namespace fuseformer
