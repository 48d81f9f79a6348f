// Flash attention, backward, at a head dim where a warp cannot hold dk and dv of sixteen keys.
//
// The maths and the order of the sums are those of `backward_kernel.h`. Here warps share the head
// dim: each holds a part of the columns of dk and dv. Of the logits it computes sixteen queries by
// some of the keys, once, and the probabilities and dS go to the others through shared memory.
#pragma once

#include "../device/atomic.h"
#include "../device/philox.h"
#include "../device/tile.h"
#include "key_block.h"
#include "traits.h"
#include "workspace.h"

namespace fuseformer {

template <typename Traits>
struct WideBackwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kRowTiles = Traits::kBlockM / 16;
  static constexpr int kKeySteps = Traits::kBlockN / 16;
  static constexpr int kHeadSteps = Traits::kHeadDim / 16;
  static constexpr int kKeptSteps = Traits::kKeptSteps;
  // Of the logits, sixteen queries by this many eights of keys.
  static constexpr int kKeyTiles = Traits::kBlockN / 8 / Traits::kColumnGroups;
  // Of dk and dv, sixteen keys by every kHeadGroups-th sixteen of columns.
  static constexpr int kHeadGroups = Traits::kWarps / kKeySteps;
  static constexpr int kHeadTiles = Traits::kHeadDim / 8 / kHeadGroups;
  // Of dq, sixteen queries by every kColumnGroups-th sixteen of columns.
  static constexpr int kParts = 2;
  static constexpr int kPartTiles = 2 * Traits::kColumnSteps / kParts;
  using Addresses = LaneAddresses<Traits::kHeadDim>;
  using ValueAddresses = LaneAddresses<Traits::kHeadDim - 16 * kKeptSteps>;
  using LogitAddresses = LaneAddresses<Traits::kBlockN>;

  float dk[kHeadTiles][4];
  float dv[kHeadTiles][4];
  uint32_t v[kKeptSteps ? kKeptSteps : 1][kKeyTiles / 2][4];  // the last columns of values
  Addresses q_rows;                                           // operand A of the logits, and of dP
  Addresses k_columns;                                        // operand B of the logits
  ValueAddresses v_columns;                                   // operand B of dP
  LogitAddresses logit_keys;                                  // operand A of dv, and of dk
  LogitAddresses logit_rows;                                  // operand A of dq
  Addresses query_rows;                                       // operand B of dk, and of dv
  Addresses key_rows;                                         // operand B of dq
  uint32_t stored_logits;  // offset in the shared memory of the lane's first probabilities

  FUSEFORMER_DEVICE void compute_addresses_again() {
    q_rows.compute_phases_again();
    k_columns.compute_phases_again();
    v_columns.compute_phases_again();
    logit_keys.compute_phases_again();
    logit_rows.compute_phases_again();
    query_rows.compute_phases_again();
    key_rows.compute_phases_again();
    compute_again(stored_logits);
  }

  FUSEFORMER_DEVICE SharedAddress value_columns(int pair, int step) const {
    if constexpr (kKeptSteps == 0) return k_columns.at(pair, step) + Traits::kBlockN * 2 * Traits::kHeadDim;
    return v_columns.at(pair, step);
  }
  FUSEFORMER_DEVICE SharedAddress dq_keys(int step, int column) const {
    if constexpr (kHeadGroups == Traits::kColumnGroups) return query_rows.at(step, column) - Traits::kQueryOffset;
    return key_rows.at(step, column);
  }

  // products += q @ k.T for the warp's queries and keys of a step.
  FUSEFORMER_DEVICE void multiply_keys(float (&products)[kKeyTiles][4]) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, q_rows.at(0, step));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, k_columns.at(pair, step));
        mma_16x8x16<Element>(products[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(products[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // products += dout @ v.T, dout lying `offset` bytes behind the queries.
  FUSEFORMER_DEVICE void multiply_values(float (&products)[kKeyTiles][4], int offset) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, q_rows.at(0, step) + offset);
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        const int kept = step - (kHeadSteps - kKeptSteps);
        uint32_t b[4];
        if (kept >= 0) {
          FUSEFORMER_UNROLL
          for (int i = 0; i < 4; ++i) b[i] = v[kept][pair][i];
        } else {
          ldmatrix_x4(b, value_columns(pair, step));
        }
        mma_16x8x16<Element>(products[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(products[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += logits.T @ b, of the warp's keys and columns: probabilities and dout, or dS and
  // queries, offsets from the tiles of the probabilities and of the queries.
  FUSEFORMER_DEVICE void add_product(float (&sums)[kHeadTiles][4], int logit_offset, int offset) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kRowTiles; ++step) {
      uint32_t a[4];
      ldmatrix_x4_transposed(a, logit_keys.at(step, 0) + logit_offset);
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kHeadTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, query_rows.at(step, kHeadGroups * pair) + offset);
        mma_16x8x16<Element>(sums[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(sums[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // dq += dS @ k over all keys of the block, for the warp's queries and some of its columns.
  FUSEFORMER_DEVICE void multiply_logits(float (&dq)[kPartTiles][4], int part) {
    FUSEFORMER_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, logit_rows.at(0, step));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kPartTiles / 2; ++pair) {
        const int column = Traits::kColumnGroups * (part * kPartTiles / 2 + pair);
        uint32_t b[4];
        ldmatrix_x4_transposed(b, dq_keys(step, column));
        mma_16x8x16<Element>(dq[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(dq[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }
};

// dS = P * (dP * M - delta), and P = 0 where dropout keeps nothing. `row` and `key` are the lane's
// first ones, `deltas` points to that of the first row.
template <int kKeyTiles>
FUSEFORMER_DEVICE void drop_gradients(float (&weights)[kKeyTiles][4],
                                      float (&dlogits)[kKeyTiles][4], PhiloxKey seed, int batch,
                                      int head, int row, int key, uint32_t threshold, float scale,
                                      const float* deltas) {
  // The first of the ten rounds, of the same keys in every step, would stay in registers.
  uint32_t again = key;
  compute_again(again);
  key = static_cast<int>(again);
  // Words decide thirty-two keys, of which a warp may have half.
  constexpr int kTilesAtOnce = kKeyTiles < 4 ? kKeyTiles : 4;
  FUSEFORMER_UNROLL
  for (int first = 0; first < kKeyTiles; first += kTilesAtOnce) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 2; ++j) {
      uint32_t words[4];
      dropout_words(words, seed, batch, head, row, key + 8 * first + j);
      const bool upper = kTilesAtOnce == 2 && key / 16 % 2;
      FUSEFORMER_UNROLL
      for (int i = 0; i < kTilesAtOnce; ++i) {
        const uint32_t word = upper ? words[(i + 2) % 4] : words[i];
        FUSEFORMER_UNROLL
        for (int half = 0; half < 2; ++half) {
          float& weight = weights[first + i][2 * half + j];
          float& dlogit = dlogits[first + i][2 * half + j];
          const bool keeps = is_kept(word, half, threshold);
          dlogit = weight * ((keeps ? dlogit * scale : 0.0f) - deltas[8 * half]);
          if (!keeps) weight = 0.0f;
        }
      }
    }
  }
}

// Grid: (key blocks * key heads * batch,), key blocks fastest. Shared memory: keys, values but for
// the columns that are kept, queries, dout, probabilities, dS, lse and delta.
template <typename Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_backward_wide_kernel(const AttentionGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = WideBackwardWarp<Traits>;
  using Layout = Tile<Traits::kHeadDim>;
  using LogitLayout = Tile<Traits::kBlockN>;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kKeptColumns = 16 * Traits::kKeptSteps;
  constexpr int kReadColumns = Traits::kHeadDim - kKeptColumns;
  constexpr int kKeyBytes = kBlockN * Layout::kRowBytes;
  constexpr int kQueryOffset = kKeyBytes + kBlockN * Tile<kReadColumns>::kRowBytes;
  constexpr int kQueryBytes = kBlockM * Layout::kRowBytes;
  constexpr int kLogitOffset = kQueryOffset + 2 * kQueryBytes;
  constexpr int kLogitBytes = kBlockM * LogitLayout::kRowBytes;
  constexpr int kRowOffset = kLogitOffset + 2 * kLogitBytes;

  const AttentionParams& params = given.forward;
  if (const KeyBlock block = key_block<kBlockN>(params); block.key >= block.sequence.keys) return;

  const int thread = threadIdx.x, lane = thread % 32, warp_index = thread / 32;
  const int warp_row = warp_index % Warp::kRowTiles * 16;
  const int column_group = warp_index / Warp::kRowTiles;
  const int warp_key = column_group * 8 * Warp::kKeyTiles;
  const int key_step = warp_index % Warp::kKeySteps, head_group = warp_index / Warp::kKeySteps;
  const int lane_row = warp_row + lane / 4, lane_key = warp_key + lane % 4 * 2;
  const SharedAddress k_tile = shared_address(dynamic_shared());
  const SharedAddress v_tile = k_tile + kKeyBytes;
  const SharedAddress q_tile = k_tile + kQueryOffset;
  const SharedAddress p_tile = k_tile + kLogitOffset;
  const SharedAddress dlogit_tile = p_tile + kLogitBytes;
  const SharedAddress row_tile = k_tile + kRowOffset;

  Warp warp;
  warp.q_rows = Warp::Addresses::in_row_order(q_tile + warp_row * Layout::kRowBytes, lane);
  warp.k_columns = Warp::Addresses::in_column_order(k_tile + warp_key * Layout::kRowBytes, lane);
  warp.v_columns = Warp::ValueAddresses::in_column_order(
      v_tile + warp_key * Tile<kReadColumns>::kRowBytes, lane);
  warp.logit_keys = Warp::LogitAddresses::in_column_order(p_tile, lane, key_step);
  warp.logit_rows =
      Warp::LogitAddresses::in_row_order(dlogit_tile + warp_row * LogitLayout::kRowBytes, lane);
  warp.query_rows = Warp::Addresses::in_row_order(q_tile, lane, head_group);
  warp.key_rows = Warp::Addresses::in_row_order(k_tile, lane, column_group);
  warp.stored_logits = kLogitOffset + LogitLayout::offset(lane_row, warp_key / 8) + lane % 4 * 4;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kHeadTiles; ++i) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 4; ++j) warp.dk[i][j] = warp.dv[i][j] = 0.0f;
  }

  {
    const KeyBlock block = key_block<kBlockN>(params);
    const TileCopy<Traits::kHeadDim, kBlockN, Traits::kThreads> k_copy(thread, params.k.row_stride);
    const TileCopy<kReadColumns, kBlockN, Traits::kThreads> v_copy(thread, params.v.row_stride);
    const int exist = block.sequence.key_end - block.key;
    const int first = block.sequence.first_key + block.key;
    const char* v_rows = block.rows_of(params.v, block.kv_head, first);
    k_copy.begin_bounded(k_tile, block.rows_of(params.k, block.kv_head, first), exist);
    v_copy.begin_bounded(v_tile, v_rows, exist);
    if constexpr (kKeptColumns > 0) {
      // They come by the place of the probabilities and of dS.
      const TileCopy<kKeptColumns, kBlockN, Traits::kThreads> copy(thread, params.v.row_stride);
      copy.begin_bounded(p_tile, v_rows + 2 * kReadColumns, exist);
    }
    copy_async_commit();
    if constexpr (kKeptColumns > 0) {
      using Kept = LaneAddresses<kKeptColumns>;
      copy_async_wait<0>();
      block_barrier();
      const Kept kept =
          Kept::in_column_order(p_tile + warp_key * Tile<kKeptColumns>::kRowBytes, lane);
      FUSEFORMER_UNROLL
      for (int step = 0; step < Traits::kKeptSteps; ++step) {
        FUSEFORMER_UNROLL
        for (int pair = 0; pair < Warp::kKeyTiles / 2; ++pair) {
          ldmatrix_x4(warp.v[step][pair], kept.at(pair, step));
        }
      }
    }
  }
  const float scale_log2 = params.scale * 1.44269504f;

  for (int member = 0; member < params.group; ++member) {
    const KeyBlock block = key_block<kBlockN>(params);
    const Sequence& sequence = block.sequence;
    const int head = block.kv_head * params.group + member;
    const char* q_rows = block.rows_of(params.q, head, sequence.first_query);
    const char* dout_rows = block.rows_of(given.dout, head, sequence.first_query);
    // The first step of this sequence and head in the workspaces.
    const int work_step =
        head * (given.workspace_rows / kBlockM) + workspace_row<kBlockM>(params, block.batch) / kBlockM;
    const Steps steps = query_steps<kBlockM, kBlockN>(params, sequence, block.key);
    const auto turn = [&](int step) { return given.dq_turns + work_step + step; };

    // A step has two groups of copies: queries with their lse, dout with delta. What a thread has to
    // know for them is computed in every step, not kept.
    const auto begin_copies = [&](auto bounded, const HeadTensor& tensor, const char* rows, int step,
                                  int second) {
      uint32_t again = thread;
      compute_again(again);
      const TileCopy<Traits::kHeadDim, kBlockM, Traits::kThreads> copy(again, tensor.row_stride);
      const SharedAddress target = q_tile + second * kQueryBytes;
      const char* from = rows + 2 * step * kBlockM * tensor.row_stride;
      if constexpr (decltype(bounded)::value) {
        copy.begin_bounded(target, from, sequence.queries - step * kBlockM);
      } else {
        copy.begin(target, from);
      }
      if (again < kBlockM / 4) {
        const float* values = second ? given.delta : given.lse_log2;
        copy_async_16(row_tile + (second * kBlockM / 4 + again) * 16,
                      values + int64_t{kBlockM} * (work_step + step) + again * 4);
      }
      copy_async_commit();
    };
    const auto begin_queries = [&](auto bounded, int step) {
      begin_copies(bounded, params.q, q_rows, step, 0);
    };
    const auto begin_dout = [&](auto bounded, int step) {
      begin_copies(bounded, given.dout, dout_rows, step, 1);
    };

    PhiloxKey seed{0, 0};
    if constexpr (kDropout) seed = seed_of(params.seed);
    int added_to = -1;
    const auto add_step = [&](auto masked, int step, int next) {
      constexpr bool kMasked = decltype(masked)::value;
      // Everyone has left the last step, and the queries of this one are in; dout may be on its
      // way.
      copy_async_wait<1>();
      block_barrier();
      if (given.dq_turns != nullptr && added_to >= 0 && thread == 0) pass_turn(turn(added_to));
      warp.compute_addresses_again();
      float weights[Warp::kKeyTiles][4] = {};
      warp.multiply_keys(weights);
      const int row = step * kBlockM + lane_row, key = block.key + lane_key;
      if constexpr (kMasked) hide(weights, params, sequence, row, key);
      const float* row_values =
          reinterpret_cast<const float*>(dynamic_shared() + kRowOffset) + lane_row;
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float lse = row_values[8 * half];
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kKeyTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            weights[i][j] = exp2_approximate(weights[i][j] * scale_log2 - lse);
          }
        }
      }
      copy_async_wait<0>();
      block_barrier();
      // Without dropout delta comes off for nothing: the products begin with it.
      float dlogits[Warp::kKeyTiles][4];
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kKeyTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          dlogits[i][j] = kDropout ? 0.0f : -row_values[kBlockM + j / 2 * 8];
        }
      }
      warp.multiply_values(dlogits, kQueryBytes);
      if constexpr (kDropout) {
        compute_again(seed.low);
        compute_again(seed.high);
        drop_gradients(weights, dlogits, seed, block.batch, head, row, key, params.dropout_threshold,
                       params.dropout_scale, row_values + kBlockM);
      } else {
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kKeyTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) dlogits[i][j] *= weights[i][j];
        }
      }
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kKeyTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int half = 0; half < 2; ++half) {
          unsigned char* const place =
              dynamic_shared() + (warp.stored_logits ^ i * 16) + 8 * half * LogitLayout::kRowBytes;
          *reinterpret_cast<uint32_t*>(place) =
              pack<Element>(weights[i][2 * half], weights[i][2 * half + 1]);
          *reinterpret_cast<uint32_t*>(place + kLogitBytes) =
              pack<Element>(dlogits[i][2 * half], dlogits[i][2 * half + 1]);
        }
      }
      block_barrier();
      warp.add_product(warp.dk, kLogitBytes, 0);
      // The copies of the next step begin as soon as everyone has read what they overwrite.
      block_barrier();
      if (next >= 0) begin_queries(Constant<false>(), next);
      warp.add_product(warp.dv, 0, kQueryBytes);
      if (given.dq_turns != nullptr && thread == 0) {
        wait_for_turn(turn(step), turn_of<kBlockM, kBlockN>(params, sequence, block.key, step));
      }
      block_barrier();
      if (next >= 0) begin_dout(Constant<false>(), next);
      float* sums =
          given.dq_sums + int64_t{kBlockM * Traits::kHeadDim} * (work_step + step) + thread;
      FUSEFORMER_UNROLL
      for (int part = 0; part < Warp::kParts; ++part) {
        float dq[Warp::kPartTiles][4] = {};
        warp.multiply_logits(dq, part);
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kPartTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int place = 4 * (part * Warp::kPartTiles + i) + j;
            atomic_add(sums + place * Traits::kThreads, dq[i][j]);
          }
        }
      }
      if (given.dq_turns != nullptr) publish();
      added_to = step;
    };
    if (steps.count() == 0) continue;
    begin_queries(Constant<true>(), steps.at(0));
    begin_dout(Constant<true>(), steps.at(0));
    const auto following = [&](int index) { return index < steps.count() ? steps.at(index) : -1; };
    for (int index = 0; index < steps.masked(); ++index) {
      add_step(Constant<true>(), steps.at(index), following(index + 1));
    }
    for (int step = steps.full_end - 1; step >= steps.full_begin; --step) {
      add_step(Constant<false>(), step, step > steps.full_begin ? step - 1 : -1);
    }
    block_barrier();
    if (given.dq_turns != nullptr && thread == 0) pass_turn(turn(added_to));
  }

  // Rows of dk and dv are gathered where all else has been; nobody reads that any more.
  copy_async_wait<0>();
  block_barrier();
  const float dv_scale = kDropout ? params.dropout_scale : 1.0f;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kHeadTiles; ++i) {
    const int chunk = 2 * (head_group + i / 2 * Warp::kHeadGroups) + i % 2;
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int offset = Layout::offset(16 * key_step + lane / 4 + 8 * half, chunk) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = pack<Element>(
          warp.dk[i][2 * half] * params.scale, warp.dk[i][2 * half + 1] * params.scale);
      *reinterpret_cast<uint32_t*>(dynamic_shared() + kKeyBytes + offset) =
          pack<Element>(warp.dv[i][2 * half] * dv_scale, warp.dv[i][2 * half + 1] * dv_scale);
    }
  }
  block_barrier();
  const KeyBlock block = key_block<kBlockN>(params);
  const int first = block.sequence.first_key + block.key;
  char* dk_rows = block.rows_of(given.dk, block.kv_head, first);
  char* dv_rows = block.rows_of(given.dv, block.kv_head, first);
  for (int chunk = thread; chunk < kBlockN * Layout::kChunks; chunk += Traits::kThreads) {
    const int row = chunk / Layout::kChunks, column = chunk % Layout::kChunks;
    if (block.key + row < block.sequence.keys) {
      const int offset = Layout::offset(row, column);
      copy_16(dk_rows + 2 * row * given.dk.row_stride + 16 * column, dynamic_shared() + offset);
      copy_16(dv_rows + 2 * row * given.dv.row_stride + 16 * column,
              dynamic_shared() + kKeyBytes + offset);
    }
  }
}

}  // namespace fuseformer
