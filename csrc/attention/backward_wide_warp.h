// What a warp of the wide backward kernel holds and computes.
//
// Warps share the head dim: each holds some columns of dk and dv of its keys. A warp computes
// sixteen queries by some keys of the logits, once, and the others get the probabilities and dS
// through shared memory.
#pragma once

#include "../device/philox.h"
#include "../device/tile.h"
#include "traits.h"

namespace fuseformer {

template <typename Traits>
struct WideBackwardWarp {
  using Element = typename Traits::Element;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr int kRowTiles = kBlockM / 16;
  static constexpr int kKeySteps = kBlockN / 16;
  static constexpr int kHeadSteps = Traits::kHeadDim / 16;
  static constexpr int kKeptSteps = Traits::kKeptSteps;
  // Of the logits, sixteen queries by this many eights of keys.
  static constexpr int kKeyTiles = kBlockN / 8 / Traits::kColumnGroups;
  // Of dk and dv, sixteen keys by every kHeadGroups-th sixteen of columns.
  static constexpr int kHeadGroups = Traits::kWarps / kKeySteps;
  static constexpr int kHeadTiles = Traits::kHeadDim / 8 / kHeadGroups;
  // Of dq, sixteen queries by every kColumnGroups-th sixteen of columns, in two parts.
  static constexpr int kParts = 2;
  static constexpr int kPartTiles = 2 * Traits::kColumnSteps / kParts;

  // Offsets in the shared memory: keys, values but for the columns that are kept, queries, dout,
  // probabilities, dS, lse and delta.
  using Layout = Tile<Traits::kHeadDim>;
  using ValueLayout = Tile<Traits::kHeadDim - 16 * kKeptSteps>;
  using LogitLayout = Tile<kBlockN>;
  static constexpr int kValues = kBlockN * Layout::kRowBytes;
  static constexpr int kQueries = kValues + kBlockN * ValueLayout::kRowBytes;
  static constexpr int kDout = kQueries + kBlockM * Layout::kRowBytes;
  static constexpr int kProbabilities = kDout + kBlockM * Layout::kRowBytes;
  static constexpr int kLogitBytes = kBlockM * LogitLayout::kRowBytes;
  static constexpr int kGradients = kProbabilities + kLogitBytes;
  static constexpr int kRowValues = kGradients + kLogitBytes;
  using Addresses = LaneAddresses<Traits::kHeadDim>;
  using ValueAddresses = LaneAddresses<Traits::kHeadDim - 16 * kKeptSteps>;
  using LogitAddresses = LaneAddresses<kBlockN>;

  // What follows from the number of the thread. It is computed where it is used: the sums leave no
  // registers to keep it in.
  struct Place {
    int lane;
    int row;           // of the logits and of dq, the first one in a step
    int column_group;  // of dq
    int key;           // of the logits, the first one in the block
    int key_step;      // of dk and dv
    int head_group;

    FUSEFORMER_DEVICE Place() {
      const int thread = thread_again<Traits::kThreads>(), warp = thread / 32;
      lane = thread % 32;
      row = warp % kRowTiles * 16;
      column_group = warp / kRowTiles;
      key = column_group * 8 * kKeyTiles;
      key_step = warp % kKeySteps;
      head_group = warp / kKeySteps;
    }
  };

  float dk[kHeadTiles][4];
  float dv[kHeadTiles][4];
  uint32_t v[kKeptSteps ? kKeptSteps : 1][kKeyTiles / 2][4];  // the last columns of values

  // products += q @ k.T, for the warp's queries and keys of a step.
  FUSEFORMER_DEVICE void multiply_keys(float (&products)[kKeyTiles][4], SharedAddress shared) {
    const Place place;
    const auto q_rows =
        Addresses::in_row_order(shared + kQueries + place.row * Layout::kRowBytes, place.lane);
    const auto k_columns =
        Addresses::in_column_order(shared + place.key * Layout::kRowBytes, place.lane);
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

  // products += dout @ v.T, for the same.
  FUSEFORMER_DEVICE void multiply_values(float (&products)[kKeyTiles][4], SharedAddress shared) {
    const Place place;
    const auto dout_rows =
        Addresses::in_row_order(shared + kDout + place.row * Layout::kRowBytes, place.lane);
    const auto v_columns = ValueAddresses::in_column_order(
        shared + kValues + place.key * ValueLayout::kRowBytes, place.lane);
    FUSEFORMER_UNROLL
    for (int step = 0; step < kHeadSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, dout_rows.at(0, step));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
        const int kept = step - (kHeadSteps - kKeptSteps);
        uint32_t b[4];
        if (kept >= 0) {
          FUSEFORMER_UNROLL
          for (int i = 0; i < 4; ++i) b[i] = v[kept][pair][i];
        } else {
          ldmatrix_x4(b, v_columns.at(pair, step));
        }
        mma_16x8x16<Element>(products[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(products[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += a.T @ b for the warp's keys and columns: probabilities and dout, or dS and queries.
  FUSEFORMER_DEVICE void add_product(float (&sums)[kHeadTiles][4], SharedAddress a_tile,
                                     SharedAddress b_tile) {
    const Place place;
    const auto a_keys = LogitAddresses::in_column_order(a_tile, place.lane, place.key_step);
    const auto b_rows = Addresses::in_row_order(b_tile, place.lane, place.head_group);
    FUSEFORMER_UNROLL
    for (int step = 0; step < kRowTiles; ++step) {
      uint32_t a[4];
      ldmatrix_x4_transposed(a, a_keys.at(step, 0));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kHeadTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, b_rows.at(step, kHeadGroups * pair));
        mma_16x8x16<Element>(sums[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(sums[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // dq = dS @ k over all keys of the block, for the warp's queries and a part of its columns.
  FUSEFORMER_DEVICE void multiply_gradients(float (&dq)[kPartTiles][4], int part,
                                            SharedAddress shared) {
    const Place place;
    const auto gradient_rows = LogitAddresses::in_row_order(
        shared + kGradients + place.row * LogitLayout::kRowBytes, place.lane);
    const auto key_rows = Addresses::in_row_order(shared, place.lane, place.column_group);
    FUSEFORMER_UNROLL
    for (int step = 0; step < kKeySteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a, gradient_rows.at(0, step));
      FUSEFORMER_UNROLL
      for (int pair = 0; pair < kPartTiles / 2; ++pair) {
        const int column = Traits::kColumnGroups * (part * kPartTiles / 2 + pair);
        uint32_t b[4];
        ldmatrix_x4_transposed(b, key_rows.at(step, column));
        mma_16x8x16<Element>(dq[2 * pair], a, b[0], b[1]);
        mma_16x8x16<Element>(dq[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }

  // Gives probabilities and dS to all warps, behind a barrier.
  FUSEFORMER_DEVICE void store(const float (&weights)[kKeyTiles][4],
                               const float (&dlogits)[kKeyTiles][4]) {
    const Place place;
    const int first = kProbabilities + place.lane % 4 * 4 +
                      LogitLayout::offset(place.row + place.lane / 4, place.key / 8);
    FUSEFORMER_UNROLL
    for (int i = 0; i < kKeyTiles; ++i) {
      FUSEFORMER_UNROLL
      for (int half = 0; half < 2; ++half) {
        unsigned char* const target =
            dynamic_shared() + (first ^ i * 16) + 8 * half * LogitLayout::kRowBytes;
        *reinterpret_cast<uint32_t*>(target) =
            pack<Element>(weights[i][2 * half], weights[i][2 * half + 1]);
        *reinterpret_cast<uint32_t*>(target + kLogitBytes) =
            pack<Element>(dlogits[i][2 * half], dlogits[i][2 * half + 1]);
      }
    }
  }
};

// dS = P * (dP * M - delta), and then P = 0 where dropout keeps nothing. `row` and `key` are the
// lane's first ones, `deltas` points to that of the first row.
template <int kKeyTiles>
FUSEFORMER_DEVICE void drop_gradients(float (&weights)[kKeyTiles][4],
                                      float (&dlogits)[kKeyTiles][4], PhiloxKey seed, int batch,
                                      int head, int row, int key, uint32_t threshold, float scale,
                                      const float* deltas) {
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

}  // namespace fuseformer
