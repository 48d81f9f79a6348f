// Flash attention, backward: dk and dv of one block of keys, and what it gives to dq, in one pass.
//
// With P the probabilities, M the dropout mask times its factor, dP = (dO V^T) * M and
// delta = rowsum(dO * O) - dlse, the gradient of the logits is dS = P * (dP - delta), and
// dv = (P * M)^T dO, dk = dS^T Q, dq = dS K. Blocks add to dq one after the other, in the order of
// their keys (`backward_order.h`): the sum is the same in every run.
//
// Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
// 2023.
#pragma once

#include "../device/atomic.h"
#include "../device/philox.h"
#include "key_block.h"
#include "traits.h"

namespace fuseformer {

// What one warp holds, transposed: its sixteen keys are rows, the queries of a step columns.
template <typename Traits>
struct BackwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kQueryTiles = Traits::kBlockM / 8;
  static constexpr int kHeadTiles = Traits::kHeadDim / 8;
  static constexpr int kHeadSteps = Traits::kHeadDim / 16;
  static constexpr int kRowTiles = Traits::kBlockM / 16;  // of dq
  static constexpr int kColumnTiles = 2 * Traits::kColumnSteps;
  // Keys and values stay in registers where they leave room for the gradients.
  static constexpr bool kKeepOperands = kHeadSteps <= 4;
  using Addresses = LaneAddresses<Traits::kHeadDim>;
  using LogitAddresses = LaneAddresses<Traits::kBlockM>;

  // Offsets in the shared memory: keys, values, kStages tiles of queries, as many of dout, dS, and
  // kStages of lse and of delta.
  using Layout = Tile<Traits::kHeadDim>;
  using LogitLayout = Tile<Traits::kBlockM>;
  static constexpr int kKeyBytes = Traits::kBlockN * Layout::kRowBytes;
  static constexpr int kQueryBytes = Traits::kBlockM * Layout::kRowBytes;
  static constexpr int kQueries = 2 * kKeyBytes;
  static constexpr int kDout = kQueries + Traits::kStages * kQueryBytes;
  static constexpr int kLogits = kDout + Traits::kStages * kQueryBytes;
  static constexpr int kRowValues = kLogits + Traits::kBlockN * LogitLayout::kRowBytes;

  float dk[kHeadTiles][4];
  float dv[kHeadTiles][4];
  uint32_t k[kKeepOperands ? kHeadSteps : 1][4];
  uint32_t v[kKeepOperands ? kHeadSteps : 1][4];
  // What follows from the number of the thread. It is computed where it is used: the sums leave no
  // registers to keep it in.
  struct Place {
    int lane;
    int warp;

    FUSEFORMER_DEVICE Place() {
      const int thread = thread_again<Traits::kThreads>();
      lane = thread % 32;
      warp = thread / 32;
    }
  };

  // products = a @ b.T, a being the warp's keys or values, kept or in `a_tile`, b the queries or
  // dout of a step.
  FUSEFORMER_DEVICE void multiply_transposed(
      float (&products)[kQueryTiles][4], const uint32_t (&kept)[kKeepOperands ? kHeadSteps : 1][4],
      SharedAddress a_tile, SharedAddress b_tile) {
    const Place place;
    const auto a_rows =
        Addresses::in_row_order(a_tile + 16 * place.warp * Layout::kRowBytes, place.lane);
    const auto b_columns = Addresses::in_column_order(b_tile, place.lane);
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[4];
      if constexpr (kKeepOperands) {
        FUSEFORMER_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = kept[step][i];
      } else {
        ldmatrix_x4(a, a_rows.at(0, step));
      }
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kQueryTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, b_columns.at(pair, step));
        mma_16x8x16<Element>(products[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(products[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += a @ b, a being sixteen keys by the queries of a step, packed as operands.
  FUSEFORMER_DEVICE void add_product(float (&sums)[kHeadTiles][4],
                                     const uint32_t (&a)[kQueryTiles / 2][4],
                                     SharedAddress b_tile) {
    const auto b_rows = Addresses::in_row_order(b_tile, Place().lane);
    FUSEFORMER_UNROLL
    for (int step = 0; step < kQueryTiles / 2; ++step) {
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kHeadTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, b_rows.at(step, pair));
        mma_16x8x16<Element>(sums[2 * pair], a[step], b[0], b[1]);
        mma_16x8x16<Element>(sums[2 * pair + 1], a[step], b[2], b[3]);
      }
    }
  }

  // Gives dS to all warps, behind a barrier.
  FUSEFORMER_DEVICE void store(const uint32_t (&dlogits)[kQueryTiles / 2][4]) {
    const Place place;
    const int first =
        kLogits + place.lane % 4 * 4 + LogitLayout::offset(16 * place.warp + place.lane / 4, 0);
    FUSEFORMER_UNROLL
    for (int i = 0; i < kQueryTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int offset = (first ^ i % 8 * 16) + 8 * half * LogitLayout::kRowBytes;
        *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = dlogits[i / 2][i % 2 * 2 + half];
      }
    }
  }

  // dq = dS @ k over all keys of the block, for this warp's rows and columns of the step.
  FUSEFORMER_DEVICE void multiply_keys(float (&dq)[kColumnTiles][4], SharedAddress shared) {
    const Place place;
    const auto key_rows = Addresses::in_row_order(shared, place.lane, place.warp / kRowTiles);
    const auto logits =
        LogitAddresses::in_column_order(shared + kLogits, place.lane, place.warp % kRowTiles);
    FUSEFORMER_UNROLL
    for (int step = 0; step < Traits::kBlockN / 16; ++step) {
      uint32_t a[4];
      ldmatrix_x4_transposed(a, logits.at(step, 0));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, key_rows.at(step, Traits::kColumnGroups * pair));
        mma_16x8x16<Element>(dq[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(dq[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }
};

// Hides what queries do not see of a warp's keys; `row` and `key` are the lane's first ones.
template <int kQueryTiles>
FUSEFORMER_DEVICE void hide_transposed(float (&products)[kQueryTiles][4],
                                       const AttentionParams& params, const Sequence& sequence,
                                       int row, int key) {
  FUSEFORMER_UNROLL
  for (int i = 0; i < kQueryTiles; ++i) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 4; ++j) {
      const VisibleKeys visible(params, sequence, row + 8 * i + j % 2);
      if (!visible.holds(key + j / 2 * 8)) products[i][j] = kMinusInfinity;
    }
  }
}

// Which of a warp's probabilities dropout keeps, a bit each: 4 * tile + j.
template <int kQueryTiles>
FUSEFORMER_DEVICE uint32_t kept_transposed(PhiloxKey seed, int batch, int head, int row, int key,
                                           uint32_t threshold) {
  uint32_t kept = 0;
  FUSEFORMER_UNROLL
  for (int pair = 0; pair < kQueryTiles / 2; ++pair) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 2; ++j) {
      uint32_t words[4];
      dropout_words(words, seed, batch, head, row + 16 * pair + j, key);
      const bool upper = key / 16 % 2;  // of the thirty-two keys that the words decide
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int bit = 4 * (2 * pair + half) + j;
        kept |= static_cast<uint32_t>(is_kept(upper ? words[2] : words[0], half, threshold)) << bit;
        kept |= static_cast<uint32_t>(is_kept(upper ? words[3] : words[1], half, threshold))
                << (bit + 2);
      }
    }
  }
  return kept;
}

// Grid: (key blocks * key heads * batch,), key blocks fastest. Shared memory: keys, values, kStages
// tiles of queries, as many of dout, dS, and kStages of lse and of delta.
template <typename Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_backward_kernel(const AttentionGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = BackwardWarp<Traits>;
  using Place = typename Warp::Place;
  // Whether the sums leave no registers for what visits have in common. With dropout, random words
  // take them from head dim 64 on.
  constexpr bool kFull = Traits::kHeadDim * Traits::kBlockM >= 8192;
  using Queries = QueryVisits<Traits, Traits::kSharedBytes - kKeptBytes,
                              kFull || (kDropout && Traits::kHeadDim >= 64)>;
  using Layout = Tile<Traits::kHeadDim>;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kKeyBytes = Warp::kKeyBytes, kQueryBytes = Warp::kQueryBytes;
  static_assert(Warp::kQueryTiles <= 8);  // `kept` has 32 bits

  const AttentionParams& params = given.forward;
  if (const KeyBlock block = key_block<kBlockN>(params); block.key >= block.sequence.keys) return;
  const int thread = threadIdx.x;
  const SharedAddress shared = shared_address(dynamic_shared());
  Warp warp;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kHeadTiles; ++i) {
    FUSEFORMER_UNROLL
    for (int j = 0; j < 4; ++j) warp.dk[i][j] = warp.dv[i][j] = 0.0f;
  }

  {
    const KeyBlock block = key_block<kBlockN>(params);
    const TileCopy<Traits::kHeadDim, kBlockN, Traits::kThreads> k_copy(thread, params.k.row_stride);
    const TileCopy<Traits::kHeadDim, kBlockN, Traits::kThreads> v_copy(thread, params.v.row_stride);
    const int exist = block.sequence.key_end - block.key;
    const int first = block.sequence.first_key + block.key;
    k_copy.begin_bounded(shared, block.rows_of(params.k, block.kv_head, first), exist);
    v_copy.begin_bounded(shared + kKeyBytes, block.rows_of(params.v, block.kv_head, first), exist);
    copy_async_commit();
    if constexpr (Warp::kKeepOperands) {
      copy_async_wait<0>();
      block_barrier();
      const Place place;
      const auto k_rows =
          Warp::Addresses::in_row_order(shared + 16 * place.warp * Layout::kRowBytes, place.lane);
      FUSEFORMER_UNROLL
      for (int step = 0; step < Warp::kHeadSteps; ++step) {
        ldmatrix_x4(warp.k[step], k_rows.at(0, step));
        ldmatrix_x4(warp.v[step], k_rows.at(0, step) + kKeyBytes);
      }
    }
  }

  Queries queries(given);
  if (queries.kept().visits.any()) {
    const auto begin_copies = [&](auto bounded, int visit, int stage) {
      constexpr bool kBounded = decltype(bounded)::value;
      const SharedAddress lse = shared + Warp::kRowValues + 8 * stage * kBlockM;
      queries.template begin_queries<kBounded>(shared + Warp::kQueries + stage * kQueryBytes, lse,
                                               visit);
      queries.template begin_dout<kBounded>(shared + Warp::kDout + stage * kQueryBytes,
                                            lse + 4 * kBlockM, visit);
      copy_async_commit();
    };

    int stage = 0;
    const auto add_visit = [&](auto masked, int visit, int next) {
      constexpr bool kMasked = decltype(masked)::value;
      // All threads have left the last visit, and the copies of this one are in.
      copy_async_wait<0>();
      block_barrier();
      queries.pass_last_turn();
      if constexpr (Traits::kStages == 2) {
        if (next >= 0) begin_copies(masked, next, stage ^ 1);
      }
      float weights[Warp::kQueryTiles][4] = {};
      warp.multiply_transposed(weights, warp.k, shared,
                               shared + Warp::kQueries + stage * kQueryBytes);
      const Place place;
      const int lane_row = place.lane % 4 * 2, lane_key = 16 * place.warp + place.lane / 4;
      const int row = queries.step(visit) * kBlockM + lane_row,
                key = queries.kept().block.key + lane_key;
      if constexpr (kMasked)
        hide_transposed(weights, params, queries.kept().block.sequence, row, key);
      const float* row_values =
          reinterpret_cast<const float*>(dynamic_shared() + Warp::kRowValues) +
          stage * 2 * kBlockM + lane_row;
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kQueryTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          weights[i][j] =
              exp2_approximate(weights[i][j] * params.scale_log2 - row_values[8 * i + j % 2]);
        }
      }
      // Without dropout delta comes off for nothing: the products begin with it.
      float dlogits[Warp::kQueryTiles][4];
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kQueryTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) {
          dlogits[i][j] = kDropout ? 0.0f : -row_values[kBlockM + 8 * i + j % 2];
        }
      }
      warp.multiply_transposed(dlogits, warp.v, shared + kKeyBytes,
                               shared + Warp::kDout + stage * kQueryBytes);
      if constexpr (kDropout) {
        const Place again;
        const int first_key = queries.kept().block.key + 16 * again.warp + again.lane / 4;
        const uint32_t kept = kept_transposed<Warp::kQueryTiles>(
            queries.kept().seed, queries.kept().block.batch, queries.head(visit),
            queries.step(visit) * kBlockM + again.lane % 4 * 2, first_key,
            params.dropout_threshold);
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kQueryTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) {
            const bool keeps = kept >> (4 * i + j) & 1;
            const float dropped = keeps ? dlogits[i][j] * params.dropout_scale : 0.0f;
            dlogits[i][j] = weights[i][j] * (dropped - row_values[kBlockM + 8 * i + j % 2]);
            if (!keeps) weights[i][j] = 0.0f;
          }
        }
      } else {
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kQueryTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) dlogits[i][j] *= weights[i][j];
        }
      }
      uint32_t weight_operand[Warp::kQueryTiles / 2][4], dlogit_operand[Warp::kQueryTiles / 2][4];
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kQueryTiles / 2; ++i) {
        as_operand<Element>(weight_operand[i], weights, i);
        as_operand<Element>(dlogit_operand[i], dlogits, i);
      }
      // Packed before the first product dS needs half the registers; behind it its store waits for
      // nothing.
      if constexpr (kFull) warp.store(dlogit_operand);
      warp.add_product(warp.dv, weight_operand, shared + Warp::kDout + stage * kQueryBytes);
      if constexpr (!kFull) warp.store(dlogit_operand);
      warp.add_product(warp.dk, dlogit_operand, shared + Warp::kQueries + stage * kQueryBytes);
      if (given.dq_turns != nullptr && thread == 0) {
        wait_for_turn(queries.turns(visit), queries.turn(visit));
      }
      block_barrier();
      if constexpr (Traits::kStages == 1) {
        if (next >= 0) begin_copies(masked, next, 0);
      }
      float dq[Warp::kColumnTiles][4] = {};
      warp.multiply_keys(dq, shared);
      float* sums = queries.sums(visit);
      FUSEFORMER_UNROLL
      for (int i = 0; i < Warp::kColumnTiles; ++i) {
        FUSEFORMER_UNROLL
        for (int j = 0; j < 4; ++j) atomic_add(sums + (4 * i + j) * Traits::kThreads, dq[i][j]);
      }
      queries.has_added_to(visit);
      if constexpr (Traits::kStages == 2) stage ^= 1;
    };
    begin_copies(Constant<true>(), queries.kept().visits.first(), 0);
    queries.for_each(add_visit);
    block_barrier();
    queries.pass_last_turn();
  }

  // Rows of dk and dv are gathered where keys and values have been; nobody reads those any more.
  copy_async_wait<0>();
  block_barrier();
  const Place place;
  const float dv_scale = kDropout ? params.dropout_scale : 1.0f;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kHeadTiles; ++i) {
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int offset =
          Layout::offset(16 * place.warp + place.lane / 4 + 8 * half, i) + place.lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = pack<Element>(
          warp.dk[i][2 * half] * params.scale, warp.dk[i][2 * half + 1] * params.scale);
      *reinterpret_cast<uint32_t*>(dynamic_shared() + kKeyBytes + offset) =
          pack<Element>(warp.dv[i][2 * half] * dv_scale, warp.dv[i][2 * half + 1] * dv_scale);
    }
  }
  block_barrier();
  write_key_gradients<Traits>(given, kKeyBytes);
}

}  // namespace fuseformer
