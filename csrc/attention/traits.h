// Tile sizes of the attention kernels: they live here alone, Python asks for them.
//
// A warp owns whole rows, 16 or 32 of them: with 32 each fragment of keys or values that it loads
// feeds two products.
#pragma once

namespace fuseformer {

// The shared memory that a block may have on every GPU from sm_80 on: sm_86, sm_89 and sm_120 have
// no more.
constexpr int kLeastShared = 99 * 1024;

template <typename Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kWarps_, int kStages_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a block
  static constexpr int kBlockN = kBlockN_;  // keys of a step
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;  // tiles of keys, and of values, that fit
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kBlockM / kWarps / 16;  // sixteens of rows that a warp owns
  static constexpr int kSharedBytes = 2 * kHeadDim * (kBlockM + 2 * kStages * kBlockN);
  static_assert(kRowTiles * kWarps * 16 == kBlockM && kBlockN % 32 == 0 && kHeadDim % 32 == 0);
  static_assert(kSharedBytes <= kLeastShared);
};

// One buffer of keys and values at head dim 256: two would leave steps of 32 keys, and the output,
// which is rescaled in every step, is large.
template <typename Element, int kHeadDim>
struct ForwardConfig;
template <typename Element>
struct ForwardConfig<Element, 32> : ForwardTraits<Element, 32, 128, 64, 4, 2> {};
template <typename Element>
struct ForwardConfig<Element, 64> : ForwardTraits<Element, 64, 128, 128, 8, 2> {};
template <typename Element>
struct ForwardConfig<Element, 96> : ForwardTraits<Element, 96, 128, 64, 8, 2> {};
template <typename Element>
struct ForwardConfig<Element, 128> : ForwardTraits<Element, 128, 128, 64, 8, 2> {};
template <typename Element>
struct ForwardConfig<Element, 256> : ForwardTraits<Element, 256, 64, 64, 4, 1> {};

// Where a block keeps what its steps of one head have in common.
constexpr int kKeptBytes = 96;

// Backward, a block owns keys and walks over steps of queries. A warp owns sixteen keys, whose dk
// and dv it holds.
template <typename Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kStages_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a step
  static constexpr int kBlockN = kBlockN_;  // keys of a block
  static constexpr int kWarps = kBlockN / 16;
  static constexpr int kStages = kStages_;  // tiles of queries, and of dout, that fit
  static constexpr int kThreads = 32 * kWarps;
  // Of dq of a step, a warp computes sixteen rows of every kColumnGroups-th sixteen of columns.
  static constexpr int kColumnGroups = kWarps / (kBlockM / 16);
  static constexpr int kColumnSteps = kHeadDim / 16 / kColumnGroups;
  static constexpr int kSharedBytes = 2 * kHeadDim * (2 * kBlockN + 2 * kStages * kBlockM) +
                                      2 * kBlockN * kBlockM + 2 * kStages * kBlockM * 4 +
                                      kKeptBytes;
  static_assert(kColumnGroups * (kBlockM / 16) == kWarps &&
                kColumnSteps * kColumnGroups * 16 == kHeadDim &&
                (kColumnGroups & (kColumnGroups - 1)) == 0);
};

template <typename Element, int kHeadDim>
struct BackwardConfig;
template <typename Element>
struct BackwardConfig<Element, 32> : BackwardTraits<Element, 32, 64, 128, 2> {};
template <typename Element>
struct BackwardConfig<Element, 64> : BackwardTraits<Element, 64, 64, 128, 2> {};
template <typename Element>
struct BackwardConfig<Element, 96> : BackwardTraits<Element, 96, 64, 128, 2> {};
template <typename Element>
struct BackwardConfig<Element, 128> : BackwardTraits<Element, 128, 64, 128, 2> {};

// What fits into kLeastShared where those above do not.
template <typename Element, int kHeadDim>
struct SmallBackwardConfig;
template <typename Element>
struct SmallBackwardConfig<Element, 96> : BackwardTraits<Element, 96, 64, 64, 2> {};
template <typename Element>
struct SmallBackwardConfig<Element, 128> : BackwardTraits<Element, 128, 32, 128, 1> {};

// The same where warps share the head dim. Of the values, the last kKeptSteps sixteens of columns
// stay in registers: their place in shared memory is needed.
template <typename Element_, int kHeadDim_, int kBlockM_, int kBlockN_, int kKeptSteps_>
struct WideBackwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a step
  static constexpr int kBlockN = kBlockN_;  // keys of a block
  static constexpr int kKeptSteps = kKeptSteps_;
  static constexpr int kWarps = 8;
  static constexpr int kStages = 1;
  static constexpr int kThreads = 32 * kWarps;
  // Warps that share sixteen queries: they divide their keys, and the columns of dq.
  static constexpr int kColumnGroups = kWarps / (kBlockM / 16);
  static constexpr int kColumnSteps = kHeadDim / 16 / kColumnGroups;
  static constexpr int kSharedBytes = 2 * kHeadDim * (2 * kBlockN + 2 * kBlockM) -
                                      2 * 16 * kKeptSteps * kBlockN + 2 * 2 * kBlockN * kBlockM +
                                      2 * kBlockM * 4 + kKeptBytes;
  static_assert(kColumnGroups * (kBlockM / 16) == kWarps &&
                kColumnSteps * kColumnGroups * 16 == kHeadDim && 8 * kKeptSteps <= kBlockM);
};
template <typename Element>
struct BackwardConfig<Element, 256> : WideBackwardTraits<Element, 256, 64, 64, 0> {};
template <typename Element>
struct SmallBackwardConfig<Element, 256> : WideBackwardTraits<Element, 256, 32, 64, 4> {};

// Decoding, a warp takes sixteen keys of a step for sixteen rows: heads that share keys, times new
// tokens.
template <typename Element_, int kHeadDim_>
struct DecodeTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 16;
  static constexpr int kBlockN = kHeadDim > 128 ? 32 : 64;  // keys of a step
  static constexpr int kWarps = kBlockN / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = 2;
  // Floats from one row of a warp's sums to the next: four rows fall into different banks.
  static constexpr int kSumStride = kHeadDim + 8;
  static constexpr int kTileBytes = 2 * kHeadDim * (kRows + 2 * kStages * kBlockN);
  static constexpr int kSumBytes = 4 * kWarps * kRows * (2 + kSumStride);
  static constexpr int kSharedBytes = kTileBytes > kSumBytes ? kTileBytes : kSumBytes;
  static_assert(kSharedBytes <= kLeastShared && kBlockN * kHeadDim / 8 % kThreads == 0);
};

}  // namespace fuseformer
