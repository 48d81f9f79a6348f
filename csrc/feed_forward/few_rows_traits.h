// Tile sizes of the few-rows regime: they live here alone.
#pragma once

namespace fuseformer {

// What two blocks have on their way to a multiprocessor is more than any memory needs to deliver
// all that it can.
template <typename Element_, int kMatrices_ = 1>
struct FewRowsTraits {
  using Element = Element_;
  static constexpr int kMatrices = kMatrices_;  // 2 of a gated block's first products
  static constexpr int kRows = 16;              // tokens at most: those of one product
  static constexpr int kBlockN = 32;            // rows of weights of a block
  static constexpr int kChunk = 64;             // columns that a warp takes at a time
  static constexpr int kWarps = 4;              // that share the columns of a block
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kBlockN / 8;
  static constexpr int kUnits = kBlockN / kMatrices;
  // Of the sums of a row: pairs of four rows then lie in all banks.
  static constexpr int kSumStride = kBlockN + 8;
  static constexpr int kStages = 3;                                   // of each warp
  static constexpr int kStageBytes = 2 * kChunk * (kBlockN + kRows);  // weights, then tokens
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes;
  static_assert(4 * kWarps * kRows * kSumStride <= kSharedBytes && kSharedBytes <= 99 * 1024);
};

constexpr int kSumThreads = 128;

}  // namespace fuseformer
