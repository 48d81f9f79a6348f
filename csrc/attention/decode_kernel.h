// Attention of a few new tokens over a cache: the keys of a sequence split over blocks.
//
// The query heads that share a key head are rows of one product, so that the cache is read once.
// Every warp of a block takes sixteen keys of a step and keeps a softmax of its own; they are
// joined at the end, and those of several blocks by a second kernel.
//
// Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
#pragma once

#include "../device/tile.h"
#include "decode_params.h"
#include "softmax.h"
#include "traits.h"

namespace fuseformer {

// Two neighbouring numbers, which are read and written at once.
struct alignas(8) FloatPair {
  float low;
  float high;
};

// The keys of a sequence that some row sees, and how its splits share them: whole steps.
struct SplitRange {
  int length;
  int begin;
  int size;

  template <int kBlockN>
  static FUSEFORMER_DEVICE SplitRange of(const DecodeParams& params, int batch) {
    SplitRange range;
    range.length = maximum(0, minimum(params.lengths[batch], params.capacity));
    const int first = maximum(0, range.length - params.queries - params.window_left);
    range.begin = first / kBlockN * kBlockN;
    const int steps = (range.length - range.begin + kBlockN - 1) / kBlockN;
    range.size = (steps + params.splits - 1) / params.splits * kBlockN;
    return range;
  }

  FUSEFORMER_DEVICE int begin_of(int split) const { return begin + split * size; }
  FUSEFORMER_DEVICE int end_of(int split) const { return minimum(begin_of(split) + size, length); }
};

// Where the rows of a key head lie in both caches, contiguous or in pages.
struct CacheRows {
  const DecodeParams& params;
  int batch;
  int kv_head;

  struct Places {
    const char* key;
    const char* value;
  };

  FUSEFORMER_DEVICE Places at(int key) const {
    int entry = batch, slot = key;
    if (params.block_table != nullptr) {
      entry = params.block_table[batch * params.table_stride + key / params.page_size];
      entry = maximum(0, minimum(entry, params.pages - 1));
      slot = key % params.page_size;
    }
    return {row(params.k, entry, slot), row(params.v, entry, slot)};
  }

 private:
  FUSEFORMER_DEVICE const char* row(const HeadTensor& cache, int64_t entry, int64_t slot) const {
    return static_cast<const char*>(cache.data) +
           2 * (entry * cache.batch_stride + kv_head * cache.head_stride + slot * cache.row_stride);
  }
};

// Grid: (row blocks * splits * key heads * batch,), those that share keys side by side. Shared
// memory: sixteen rows of queries, then two tiles of keys and two of values; at the end, where the
// tiles were, the sums of each warp.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_decode_kernel(const DecodeParams params) {
  using Element = typename Traits::Element;
  using Layout = Tile<Traits::kHeadDim>;
  using Addresses = LaneAddresses<Traits::kHeadDim>;
  constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN, kRows = Traits::kRows;
  constexpr int kTileBytes = kBlockN * Layout::kRowBytes;
  constexpr int kHeadSteps = kHeadDim / 16, kOutTiles = kHeadDim / 8;

  const int rows = params.group * params.queries;
  const int row_blocks = (rows + kRows - 1) / kRows;
  const int kv_heads = params.heads / params.group;
  const int block_row = static_cast<int>(blockIdx.x) % row_blocks * kRows;
  const int split = blockIdx.x / row_blocks % params.splits;
  const int kv_head = blockIdx.x / row_blocks / params.splits % kv_heads;
  const int batch = blockIdx.x / row_blocks / params.splits / kv_heads;
  const SplitRange range = SplitRange::of<kBlockN>(params, batch);
  const int begin = range.begin_of(split), end = range.end_of(split);
  if (begin >= end && params.splits > 1) return;  // nobody looks for it

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const SharedAddress q_tile = shared_address(dynamic_shared());
  const SharedAddress k_tile = q_tile + kRows * Layout::kRowBytes;
  const SharedAddress v_tile = k_tile + 2 * kTileBytes;
  const CacheRows cache{params, batch, kv_head};
  const auto begin_copies = [&](int step_begin, int stage) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < kBlockN * Layout::kChunks / Traits::kThreads; ++i) {
      const int index = thread + i * Traits::kThreads;
      const int row = index / Layout::kChunks, chunk = index % Layout::kChunks;
      const bool exists = step_begin + row < end;
      const CacheRows::Places places = cache.at(exists ? step_begin + row : begin);
      const int offset = stage * kTileBytes + Layout::offset(row, chunk);
      copy_async_16_or_zero(k_tile + offset, places.key + 16 * chunk, exists);
      copy_async_16_or_zero(v_tile + offset, places.value + 16 * chunk, exists);
    }
    copy_async_commit();
  };
  const auto q_row = [&](int row) {
    const int head = kv_head * params.group + row / params.queries;
    return static_cast<const char*>(params.q.data) +
           2 * (batch * params.q.batch_stride + head * params.q.head_stride +
                row % params.queries * params.q.row_stride);
  };
  for (int index = thread; index < kRows * Layout::kChunks; index += Traits::kThreads) {
    const int row = index / Layout::kChunks, chunk = index % Layout::kChunks;
    const bool exists = block_row + row < rows;
    copy_async_16_or_zero(q_tile + Layout::offset(row, chunk),
                          q_row(exists ? block_row + row : 0) + 16 * chunk, exists);
  }
  if (begin < end) begin_copies(begin, 0);
  copy_async_commit();

  const Addresses q_addresses = Addresses::in_row_order(q_tile, lane);
  const int warp_offset = warp * 16 * Layout::kRowBytes;
  const Addresses k_addresses = Addresses::in_column_order(k_tile + warp_offset, lane);
  const Addresses v_addresses = Addresses::in_row_order(v_tile + warp_offset, lane);
  float out[1][kOutTiles][4] = {};
  RunningSoftmax<1> softmax;
  softmax.clear();
  const float scale_log2 = params.scale * 1.44269504f;
  // The key that each of the lane's two rows is aligned with, and the last one that it sees.
  const int lane_row = block_row + lane / 4, diagonal = range.length - params.queries;
  const int own_key[2] = {diagonal + lane_row % params.queries,
                          diagonal + (lane_row + 8) % params.queries};
  const int last_seen[2] = {minimum(own_key[0] + params.window_right, range.length - 1),
                            minimum(own_key[1] + params.window_right, range.length - 1)};

  int stage = 0;
  for (int step_begin = begin; step_begin < end; step_begin += kBlockN, stage ^= 1) {
    copy_async_wait<0>();
    block_barrier();
    if (step_begin + kBlockN < end) begin_copies(step_begin + kBlockN, stage ^ 1);
    float weights[1][2][4] = {};
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, q_addresses.at(0, step));
      ldmatrix_x4(b, k_addresses.at(0, step) + stage * kTileBytes);
      mma_16x8x16<Element>(weights[0][0], a, b[0], b[1]);
      mma_16x8x16<Element>(weights[0][1], a, b[2], b[3]);
    }
    const int key = step_begin + 16 * warp + lane % 4 * 2;
    FUSEFORMER_UNROLL
    for (int i = 0; i < 2; ++i) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int column = key + 8 * i + j % 2;
        if (column > last_seen[j / 2] || column < own_key[j / 2] - params.window_left) {
          weights[0][i][j] = kMinusInfinity;
        }
      }
    }
    softmax.template take<true>(weights, out, scale_log2);
    uint32_t a[4];
    as_operand<Element>(a, weights[0], 0);
    FUSEFORMER_UNROLL
    for (int pair = 0; pair < kOutTiles / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, v_addresses.at(0, pair) + stage * kTileBytes);
      mma_16x8x16<Element>(out[0][2 * pair], a, b[0], b[1]);
      mma_16x8x16<Element>(out[0][2 * pair + 1], a, b[2], b[3]);
    }
  }

  // Each warp leaves its maximum and sum of every row, then its sums in units of the common
  // maximum.
  copy_async_wait<0>();
  block_barrier();
  float* const tops = reinterpret_cast<float*>(dynamic_shared());
  float* const sums = tops + Traits::kWarps * kRows;
  float* const outs = sums + Traits::kWarps * kRows;
  FUSEFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(softmax.sum[0][half]);
    if (lane % 4 == 0) {
      tops[warp * kRows + lane / 4 + 8 * half] = softmax.top[0][half];
      sums[warp * kRows + lane / 4 + 8 * half] = sum;
    }
  }
  block_barrier();
  FUSEFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float top = kMinusInfinity;
    for (int other = 0; other < Traits::kWarps; ++other) {
      top = maximum(top, tops[other * kRows + row]);
    }
    const float shift = top == kMinusInfinity ? 0.0f : top;
    const float factor = exp2_approximate((softmax.top[0][half] - shift) * scale_log2);
    float* target = outs + (warp * kRows + row) * Traits::kSumStride + lane % 4 * 2;
    FUSEFORMER_UNROLL
    for (int i = 0; i < kOutTiles; ++i) {
      *reinterpret_cast<FloatPair*>(target + 8 * i) = {out[0][i][2 * half] * factor,
                                                       out[0][i][2 * half + 1] * factor};
    }
  }
  block_barrier();
  for (int index = thread; index < kRows * kHeadDim / 2; index += Traits::kThreads) {
    const int row = index / (kHeadDim / 2), column = index % (kHeadDim / 2) * 2;
    if (block_row + row >= rows) break;
    float top = kMinusInfinity;
    for (int other = 0; other < Traits::kWarps; ++other) {
      top = maximum(top, tops[other * kRows + row]);
    }
    const float shift = top == kMinusInfinity ? 0.0f : top;
    float sum = 0.0f, low = 0.0f, high = 0.0f;
    for (int other = 0; other < Traits::kWarps; ++other) {
      const int place = other * kRows + row;
      sum += sums[place] * exp2_approximate((tops[place] - shift) * scale_log2);
      const auto part =
          *reinterpret_cast<const FloatPair*>(outs + place * Traits::kSumStride + column);
      low += part.low;
      high += part.high;
    }
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse_log2 =
        sum == 0.0f ? kMinusInfinity : shift * scale_log2 + log2_approximate(sum);
    const int head = kv_head * params.group + (block_row + row) / params.queries;
    const int query = (block_row + row) % params.queries;
    const int64_t place =
        (static_cast<int64_t>(batch) * params.heads + head) * params.queries + query;
    if (params.splits == 1) {
      write_decoded<Element>(params, batch, head, query, column, low * factor, high * factor);
      if (column == 0) params.lse[place] = lse_log2 * 0.69314718f;
    } else {
      float* partial = params.partial_out + (place * params.splits + split) * kHeadDim + column;
      *reinterpret_cast<FloatPair*>(partial) = {low * factor, high * factor};
      if (column == 0) params.partial_lse[place * params.splits + split] = lse_log2;
    }
  }
}

// Joins the splits of each row by their lse.
//
// Grid: (rows / kMergeRows,), a warp for each row of (batch, heads, queries).
template <typename Traits>
__global__ void __launch_bounds__(32 * kMergeRows)
    attention_merge_kernel(const DecodeParams params) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kMergeRows + threadIdx.x / 32;
  if (place >= static_cast<int64_t>(params.batch) * params.heads * params.queries) return;
  const int query = static_cast<int>(place % params.queries);
  const int head = static_cast<int>(place / params.queries % params.heads);
  const int batch = static_cast<int>(place / params.queries / params.heads);
  const SplitRange range = SplitRange::of<Traits::kBlockN>(params, batch);
  const float* lse = params.partial_lse + place * params.splits;
  const auto is_used = [&](int split) { return range.begin_of(split) < range.end_of(split); };
  float top = kMinusInfinity;
  for (int split = 0; split < params.splits && is_used(split); ++split) {
    top = maximum(top, lse[split]);
  }
  const float shift = top == kMinusInfinity ? 0.0f : top;
  float sum = 0.0f;
  for (int split = 0; split < params.splits && is_used(split); ++split) {
    sum += exp2_approximate(lse[split] - shift);
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int column = 2 * lane; column < Traits::kHeadDim; column += 64) {
    float low = 0.0f, high = 0.0f;
    for (int split = 0; split < params.splits && is_used(split); ++split) {
      const float weight = exp2_approximate(lse[split] - shift);
      const float* partial =
          params.partial_out + (place * params.splits + split) * Traits::kHeadDim + column;
      const FloatPair part = *reinterpret_cast<const FloatPair*>(partial);
      low += weight * part.low;
      high += weight * part.high;
    }
    write_decoded<Element>(params, batch, head, query, column, low * factor, high * factor);
  }
  if (lane == 0) {
    params.lse[place] =
        sum == 0.0f ? kMinusInfinity : (shift + log2_approximate(sum)) * 0.69314718f;
  }
}

}  // namespace fuseformer
