// Flash attention, backward, at a head dim where a warp cannot hold dk and dv of sixteen keys.
//
// The maths and the order of the sums are those of `backward_kernel.h`. Here warps share the head
// dim, and a step of queries has one place in shared memory: its copies begin as soon as what they
// overwrite has been read, queries and dout each while two other products are computed.
#pragma once

#include "../device/atomic.h"
#include "backward_wide_warp.h"
#include "key_block.h"

namespace fuseformer {

// Grid: (key blocks * key heads * batch,), key blocks fastest.
template <typename Traits, bool kDropout>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_backward_wide_kernel(const AttentionGradientParams given) {
  using Element = typename Traits::Element;
  using Warp = WideBackwardWarp<Traits>;
  using Place = typename Warp::Place;
  using Layout = typename Warp::Layout;
  constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  constexpr int kKeptColumns = 16 * Traits::kKeptSteps;
  constexpr int kReadColumns = Traits::kHeadDim - kKeptColumns;

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
    const TileCopy<kReadColumns, kBlockN, Traits::kThreads> v_copy(thread, params.v.row_stride);
    const int exist = block.sequence.key_end - block.key;
    const int first = block.sequence.first_key + block.key;
    const char* v_rows = block.rows_of(params.v, block.kv_head, first);
    k_copy.begin_bounded(shared, block.rows_of(params.k, block.kv_head, first), exist);
    v_copy.begin_bounded(shared + Warp::kValues, v_rows, exist);
    if constexpr (kKeptColumns > 0) {
      // They come by the place of the probabilities and of dS.
      using Kept = LaneAddresses<kKeptColumns>;
      const TileCopy<kKeptColumns, kBlockN, Traits::kThreads> copy(thread, params.v.row_stride);
      const SharedAddress kept_tile = shared + Warp::kProbabilities;
      copy.begin_bounded(kept_tile, v_rows + 2 * kReadColumns, exist);
      copy_async_commit();
      copy_async_wait<0>();
      block_barrier();
      const Place place;
      const Kept kept =
          Kept::in_column_order(kept_tile + place.key * Tile<kKeptColumns>::kRowBytes, place.lane);
      FUSEFORMER_UNROLL
      for (int step = 0; step < Traits::kKeptSteps; ++step) {
        FUSEFORMER_UNROLL
        for (int pair = 0; pair < Warp::kKeyTiles / 2; ++pair) {
          ldmatrix_x4(warp.v[step][pair], kept.at(pair, step));
        }
      }
    } else {
      copy_async_commit();
    }
  }

  QueryVisits<Traits, Traits::kSharedBytes - kKeptBytes, true> queries(given);
  if (queries.kept().visits.any()) {
    // A visit has two groups of copies: queries with their lse, dout with delta.
    const auto begin_queries = [&](auto bounded, int visit) {
      queries.template begin_queries<decltype(bounded)::value>(shared + Warp::kQueries,
                                                               shared + Warp::kRowValues, visit);
      copy_async_commit();
    };
    const auto begin_dout = [&](auto bounded, int visit) {
      queries.template begin_dout<decltype(bounded)::value>(
          shared + Warp::kDout, shared + Warp::kRowValues + 4 * kBlockM, visit);
      copy_async_commit();
    };

    const auto add_visit = [&](auto masked, int visit, int next) {
      constexpr bool kMasked = decltype(masked)::value;
      // All threads have left the last visit, and the queries of this one are in; dout may be on
      // its way.
      copy_async_wait<1>();
      block_barrier();
      queries.pass_last_turn();
      float weights[Warp::kKeyTiles][4] = {};
      warp.multiply_keys(weights, shared);
      const Place place;
      const int lane_row = place.row + place.lane / 4;
      const int row = queries.step(visit) * kBlockM + lane_row;
      const int key = queries.kept().block.key + place.key + place.lane % 4 * 2;
      if constexpr (kMasked) hide(weights, params, queries.kept().block.sequence, row, key);
      const float* row_values =
          reinterpret_cast<const float*>(dynamic_shared() + Warp::kRowValues) + lane_row;
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float lse = row_values[8 * half];
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kKeyTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            weights[i][j] = exp2_approximate(weights[i][j] * params.scale_log2 - lse);
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
      warp.multiply_values(dlogits, shared);
      if constexpr (kDropout) {
        drop_gradients(weights, dlogits, queries.kept().seed, queries.kept().block.batch,
                       queries.head(visit), row, key, params.dropout_threshold,
                       params.dropout_scale, row_values + kBlockM);
      } else {
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kKeyTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) dlogits[i][j] *= weights[i][j];
        }
      }
      warp.store(weights, dlogits);
      block_barrier();
      warp.add_product(warp.dk, shared + Warp::kGradients, shared + Warp::kQueries);
      // The copies of the next visit begin as soon as everyone has read what they overwrite.
      block_barrier();
      if (next >= 0) begin_queries(masked, next);
      warp.add_product(warp.dv, shared + Warp::kProbabilities, shared + Warp::kDout);
      if (given.dq_turns != nullptr && thread == 0) {
        wait_for_turn(queries.turns(visit), queries.turn(visit));
      }
      block_barrier();
      if (next >= 0) begin_dout(masked, next);
      float* sums = queries.sums(visit);
      FUSEFORMER_UNROLL
      for (int part = 0; part < Warp::kParts; ++part) {
        float dq[Warp::kPartTiles][4] = {};
        warp.multiply_gradients(dq, part, shared);
        FUSEFORMER_UNROLL
        for (int i = 0; i < Warp::kPartTiles; ++i) {
          FUSEFORMER_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int index = 4 * (part * Warp::kPartTiles + i) + j;
            atomic_add(sums + index * Traits::kThreads, dq[i][j]);
          }
        }
      }
      queries.has_added_to(visit);
    };
    const int first = queries.kept().visits.first();
    begin_queries(Constant<true>(), first);
    begin_dout(Constant<true>(), first);
    queries.for_each(add_visit);
    block_barrier();
    queries.pass_last_turn();
  }

  // Rows of dk and dv are gathered where all else has been; nobody reads that any more.
  copy_async_wait<0>();
  block_barrier();
  const Place place;
  constexpr int kDvOffset = kBlockN * Layout::kRowBytes;
  const float dv_scale = kDropout ? params.dropout_scale : 1.0f;
  FUSEFORMER_UNROLL
  for (int i = 0; i < Warp::kHeadTiles; ++i) {
    const int chunk = 2 * (place.head_group + i / 2 * Warp::kHeadGroups) + i % 2;
    FUSEFORMER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * place.key_step + place.lane / 4 + 8 * half;
      const int offset = Layout::offset(row, chunk) + place.lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(dynamic_shared() + offset) = pack<Element>(
          warp.dk[i][2 * half] * params.scale, warp.dk[i][2 * half + 1] * params.scale);
      *reinterpret_cast<uint32_t*>(dynamic_shared() + kDvOffset + offset) =
          pack<Element>(warp.dv[i][2 * half] * dv_scale, warp.dv[i][2 * half + 1] * dv_scale);
    }
  }
  block_barrier();
  write_key_gradients<Traits>(given, kDvOffset);
}

}  // namespace fuseformer
