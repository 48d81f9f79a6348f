// Flash attention, forward: one block of queries of one head, over steps of keys.
//
// Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
// 2023.
#pragma once

#include "../device/philox.h"
#include "../device/tile.h"
#include "mask.h"
#include "softmax.h"
#include "traits.h"

namespace fuseformer {

// What one warp holds in registers, and where its operands lie in shared memory.
template <typename Traits>
struct ForwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kRowTiles = Traits::kRowTiles;
  static constexpr int kKeyTiles = Traits::kBlockN / 8;
  static constexpr int kOutTiles = Traits::kHeadDim / 8;
  static constexpr int kHeadSteps = Traits::kHeadDim / 16;
  // Queries stay in registers where they leave room for the products.
  static constexpr bool kKeepQueries = kRowTiles * kHeadSteps <= 8;
  using Addresses = LaneAddresses<Traits::kHeadDim>;

  float out[kRowTiles][kOutTiles][4];
  RunningSoftmax<kRowTiles> softmax;
  uint32_t q[kKeepQueries ? kRowTiles : 1][kKeepQueries ? kHeadSteps : 1][4];
  Addresses q_addresses;
  Addresses k_addresses;
  Addresses v_addresses;

  // products = q @ k.T, for the tile of keys `k_offset` bytes behind the first.
  FUSEFORMER_DEVICE void multiply_keys(float (&products)[kRowTiles][kKeyTiles][4], int k_offset) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[kRowTiles][4];
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        if constexpr (kKeepQueries) {
          FUSEFORMER_UNROLL
          for (int i = 0; i < 4; ++i) a[tile][i] = q[tile][step][i];
        } else {
          ldmatrix_x4(a[tile], q_addresses.at(tile, step));
        }
      }
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, k_addresses.at(pair, step) + k_offset);
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<Element>(products[tile][2 * pair], a[tile], b[0], b[1]);
          mma_16x8x16<Element>(products[tile][2 * pair + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }

  // out += weights @ v, for the tile of values `v_offset` bytes behind the first.
  FUSEFORMER_DEVICE void multiply_values(const float (&weights)[kRowTiles][kKeyTiles][4],
                                         int v_offset) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kKeyTiles / 2; ++step) {
      uint32_t a[kRowTiles][4];
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < kRowTiles; ++tile) {
        as_operand<Element>(a[tile], weights[tile], step);
      }
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kOutTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, v_addresses.at(step, pair) + v_offset);
        FUSEFORMER_UNROLL
        for (int tile = 0; tile < kRowTiles; ++tile) {
          mma_16x8x16<Element>(out[tile][2 * pair], a[tile], b[0], b[1]);
          mma_16x8x16<Element>(out[tile][2 * pair + 1], a[tile], b[2], b[3]);
        }
      }
    }
  }
};

// Sets weights that dropout does not keep to 0. `row` and `key` are the lane's first ones.
template <int kRowTiles, int kKeyTiles>
FUSEFORMER_DEVICE void drop(float (&weights)[kRowTiles][kKeyTiles][4], PhiloxKey seed, int batch,
                            int head, int row, int key, uint32_t threshold) {
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int patch = 0; patch < kKeyTiles / 4; ++patch) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 2; ++j) {
        uint32_t words[4];
        dropout_words(words, seed, batch, head, row + 16 * tile, key + 32 * patch + j);
        FUSEFORMER_UNROLL
        for (int i = 0; i < 4; ++i) {
          FUSEFORMER_UNROLL
          for (int half = 0; half < 2; ++half) {
            float& weight = weights[tile][4 * patch + i][2 * half + j];
            if (!is_kept(words[i], half, threshold)) weight = 0.0f;
          }
        }
      }
    }
  }
}

// Grid: (query blocks * heads * batch,), query blocks fastest, the longest rows of a causal mask
// first. Shared memory: queries, then kStages tiles of keys and as many of values.
template <typename Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_forward_kernel(const AttentionParams params) {
  using Element = typename Traits::Element;
  using Warp = ForwardWarp<Traits>;
  using Layout = Tile<Traits::kHeadDim>;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kTileBytes = kBlockN * Layout::kRowBytes;
  // Whether random words leave no registers for what all steps have in common: where a warp has
  // many weights, or a large output.
  constexpr bool kComputesAgain = kDropout && (Warp::kRowTiles > 1 || !Warp::kKeepQueries);

  const int blocks = (params.queries + kBlockM - 1) / kBlockM;
  const int batch = blockIdx.x / (blocks * params.heads);
  const int head = blockIdx.x / blocks % params.heads;
  const int block_row = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kBlockM;
  const Sequence sequence = sequence_of(params, batch);
  if (block_row >= sequence.queries) return;

  const int thread = threadIdx.x, lane = thread % 32, warp_row = thread / 32 * Warp::kRowTiles * 16;
  const int lane_row = block_row + warp_row + lane / 4, lane_key = lane % 4 * 2;
  const auto rows_of = [&](const HeadTensor& tensor, int tensor_head, int first_row) {
    return static_cast<char*>(tensor.data) +
           2 * (batch * tensor.batch_stride + tensor_head * tensor.head_stride +
                first_row * tensor.row_stride);
  };
  const char* k_rows = rows_of(params.k, head / params.group, sequence.first_key);
  const char* v_rows = rows_of(params.v, head / params.group, sequence.first_key);
  using KeyCopy = TileCopy<Traits::kHeadDim, kBlockN, Traits::kThreads>;
  const KeyCopy k_copy(thread, params.k.row_stride), v_copy(thread, params.v.row_stride);
  const int64_t k_step = 2 * kBlockN * params.k.row_stride;
  const int64_t v_step = 2 * kBlockN * params.v.row_stride;

  const SharedAddress q_tile = shared_address(dynamic_shared());
  const SharedAddress k_tile = q_tile + kBlockM * Layout::kRowBytes;
  const SharedAddress v_tile = k_tile + Traits::kStages * kTileBytes;
  Warp warp;
  warp.q_addresses = Warp::Addresses::in_row_order(q_tile + warp_row * Layout::kRowBytes, lane);
  warp.k_addresses = Warp::Addresses::in_column_order(k_tile, lane);
  warp.v_addresses = Warp::Addresses::in_row_order(v_tile, lane);

  // Only the first step may reach past the last key: steps are taken from the end.
  const Steps steps = key_steps<kBlockM, kBlockN>(params, sequence, block_row);
  const int first_key = steps.at(0) * kBlockN;
  const char* q_rows = rows_of(params.q, head, sequence.first_query + block_row);
  const TileCopy<Traits::kHeadDim, kBlockM, Traits::kThreads> q_copy(thread, params.q.row_stride);
  q_copy.begin_bounded(q_tile, q_rows, sequence.queries - block_row);
  if (steps.count() > 0) {
    k_copy.begin_bounded(k_tile, k_rows + steps.at(0) * k_step, sequence.key_end - first_key);
    if constexpr (Traits::kStages == 2) {
      v_copy.begin_bounded(v_tile, v_rows + steps.at(0) * v_step, sequence.key_end - first_key);
    }
  }
  copy_async_commit();

  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < Warp::kOutTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int j = 0; j < 4; ++j) warp.out[tile][i][j] = 0.0f;
    }
  }
  warp.softmax.clear();
  const float scale_log2 = params.scale_log2;
  PhiloxKey seed{0, 0};
  if constexpr (kDropout) seed = seed_of(params.seed);
  if constexpr (Warp::kKeepQueries) {
    copy_async_wait<0>();
    block_barrier();
    FUSEFORMER_UNROLL
    for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
      FUSEFORMER_UNROLL
      for (int step = 0; step < Warp::kHeadSteps; ++step) {
        ldmatrix_x4(warp.q[tile][step], warp.q_addresses.at(tile, step));
      }
    }
  }

  int stage = 0;
  const auto attend = [&](auto masked, int index, int step, int next) {
    constexpr bool kMasked = decltype(masked)::value;
    const bool more = index + 1 < steps.count();
    const auto copy_of = [&](const KeyCopy& copy, const HeadTensor& tensor, int again) {
      return kComputesAgain ? KeyCopy(again, tensor.row_stride) : copy;
    };
    const int again = kComputesAgain ? thread_again<Traits::kThreads>() : thread;
    const KeyCopy k_next = copy_of(k_copy, params.k, again);
    const KeyCopy v_next = copy_of(v_copy, params.v, again);
    // Everyone has left the last step: what it read may be overwritten, this step's copies are in.
    copy_async_wait<0>();
    block_barrier();
    if constexpr (Traits::kStages == 2) {
      if (more) {
        const int other = (stage ^ 1) * kTileBytes;
        k_next.begin(k_tile + other, k_rows + next * k_step);
        v_next.begin(v_tile + other, v_rows + next * v_step);
        copy_async_commit();
      }
    } else {
      if (kMasked && index == 0) {
        v_next.begin_bounded(v_tile, v_rows + step * v_step, sequence.key_end - step * kBlockN);
      } else {
        v_next.begin(v_tile, v_rows + step * v_step);
      }
      copy_async_commit();
    }
    if constexpr (!Warp::kKeepQueries) {
      warp.q_addresses.compute_phases_again();
      warp.k_addresses.compute_phases_again();
      warp.v_addresses.compute_phases_again();
    }
    float weights[Warp::kRowTiles][Warp::kKeyTiles][4] = {};
    warp.multiply_keys(weights, stage * kTileBytes);
    if constexpr (Traits::kStages == 1) {
      copy_async_wait<0>();
      block_barrier();
      if (more) {
        k_next.begin(k_tile, k_rows + next * k_step);
        copy_async_commit();
      }
    }
    const int key = step * kBlockN + lane_key;
    if constexpr (kMasked) {
      FUSEFORMER_UNROLL
      for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
        hide(weights[tile], params, sequence, lane_row + 16 * tile, key);
      }
    }
    warp.softmax.template take<kMasked>(weights, warp.out, scale_log2);
    if constexpr (kDropout) {
      const int place = kComputesAgain ? thread_again<Traits::kThreads>() : thread;
      const int row = block_row + place / 32 * Warp::kRowTiles * 16 + place % 32 / 4;
      drop(weights, seed, batch, head, row, step * kBlockN + place % 4 * 2,
           params.dropout_threshold);
    }
    warp.multiply_values(weights, stage * kTileBytes);
    if constexpr (Traits::kStages == 2) stage ^= 1;
  };
  int index = 0;
  for (; index < steps.masked(); ++index) {
    attend(Constant<true>(), index, steps.at(index), steps.at(index + 1));
  }
  for (int step = steps.at(index); index < steps.count(); ++index, --step) {
    attend(Constant<false>(), index, step, step - 1);
  }

  // Each warp writes its rows over the queries that only it has read.
  const float out_scale = kDropout ? params.dropout_scale : 1.0f;
  copy_async_wait<0>();
  block_barrier();
  FUSEFORMER_UNROLL
  for (int tile = 0; tile < Warp::kRowTiles; ++tile) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(warp.softmax.sum[tile][half]);
      const float factor = sum == 0.0f ? 0.0f : out_scale / sum;
      const int row = lane_row + 16 * tile + 8 * half;
      if (lane % 4 == 0 && row < sequence.queries) {
        const float log2_sum = warp.softmax.top[tile][half] * scale_log2 + log2_approximate(sum);
        params.lse[batch * params.lse_batch_stride + head * params.lse_head_stride +
                   sequence.first_query + row] =
            sum == 0.0f ? kMinusInfinity : log2_sum * 0.69314718f;
      }
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kOutTiles; ++i) {
        const int offset = Layout::offset(row - block_row, i) + lane_key * 2;
        *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = pack<Element>(
            warp.out[tile][i][2 * half] * factor, warp.out[tile][i][2 * half + 1] * factor);
      }
    }
  }
  warp_barrier();
  char* out_rows = rows_of(params.out, head, sequence.first_query + block_row);
  constexpr int kRows = Warp::kRowTiles * 16;
  for (int chunk = lane; chunk < kRows * Layout::kChunks; chunk += 32) {
    const int row = warp_row + chunk / Layout::kChunks;
    if (block_row + row < sequence.queries) {
      copy_16(out_rows + 2 * row * params.out.row_stride + chunk % Layout::kChunks * 16,
              dynamic_shared() + Layout::offset(row, chunk % Layout::kChunks));
    }
  }
}

}  // namespace fuseformer
