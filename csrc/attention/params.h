// What a launch of attention is told; plain data, the same on the host, on the GPU and emulated.
#pragma once

#include <cstdint>

namespace fuseformer {

// A tensor of (batch, heads, rows, head_dim), the last dimension contiguous; strides in elements.
// Packed sequences have no batch stride: their rows begin where `cu_seqlens` says.
struct HeadTensor {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct AttentionParams {
  HeadTensor q;    // (batch, heads, queries, head_dim)
  HeadTensor k;    // (batch, heads / group, keys, head_dim)
  HeadTensor v;    // like k
  HeadTensor out;  // like q
  float* lse;      // (batch, heads, queries), or (heads, all queries) of packed sequences
  int64_t lse_batch_stride;
  int64_t lse_head_stride;

  int batch;
  int heads;
  int group;  // query heads that share a key head
  int queries;
  int keys;

  // Optional; the first (batch,), the others (batch + 1,). Keys at or past their length are
  // padding.
  const int* key_lengths;
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;

  // Query i sees the keys from i + diagonal - window_left to i + diagonal + window_right, where the
  // diagonal is keys - queries if `bottom_right`, else 0; keys at or past their length do not
  // count. A causal mask is a right window of 0, kNoWindow hides nothing.
  int window_left;
  int window_right;
  bool bottom_right;

  float scale;       // of the products, positive
  float scale_log2;  // the same in the units of exp2

  const int64_t* seed;  // of dropout, on the device: a captured graph may change it
  uint32_t dropout_threshold;
  float dropout_scale;
};

// What the backward pass is told besides. The workspaces hold rows of whole steps of queries: those
// of a sequence begin at `workspace_row`.
struct AttentionGradientParams {
  AttentionParams forward;
  HeadTensor dout;    // like q
  HeadTensor dk;      // like k
  HeadTensor dv;      // like v
  HeadTensor dq;      // like q
  const float* dlse;  // like lse, or null

  float* lse_log2;  // (heads, workspace rows): lse in units of exp2, +inf where nothing is seen
  float* delta;     // (heads, workspace rows): rowsum(dout * out) - dlse
  float* dq_sums;   // (heads, workspace rows * head_dim): zeros before, in the order of fragments
  int* dq_turns;    // (heads, workspace rows / kBlockM): zeros before
  int workspace_rows;
};

// A visit of a backward block is one number: the tile of queries, and in the low bits the head
// among those that share the keys.
constexpr int kMemberBits = 11;
constexpr int kMostMembers = 1 << kMemberBits;
constexpr int kMostTiles = 1 << (31 - kMemberBits);

// Wider than any sequence; sums of a few such numbers stay within 32 bits.
constexpr int kNoWindow = 1 << 29;

}  // namespace fuseformer
