// Tile sizes of the epilogue regime: they live here alone.
#pragma once

namespace fuseformer {

// Eight warps of 64 x 64: each fragment that a warp loads feeds four or eight products. A block has
// a multiprocessor for itself. Of two matrices a warp has the same units, side by side.
template <typename Element_, int kMatrices_ = 1>
struct LinearTraits {
  using Element = Element_;
  static constexpr int kMatrices = kMatrices_;  // 2 of a gated block
  static constexpr int kBlockM = 128;           // tokens of a block
  static constexpr int kBlockN = 256;           // rows of weights of a block
  static constexpr int kUnits = kBlockN / kMatrices;
  static constexpr int kBlockK = 64;  // columns of a step
  static constexpr int kWarps = 8;
  static constexpr int kWarpRows = 2;  // warps below each other
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kBlockM / kWarpRows / 16;
  static constexpr int kColumnTiles = kBlockN / (kWarps / kWarpRows) / 8;
  static constexpr int kUnitTiles = kColumnTiles / kMatrices;
  // Rows of weights that lie in a tile as they do in their matrix.
  static constexpr int kStripRows = kMatrices == 1 ? kBlockN : 8 * kUnitTiles;
  static constexpr int kStrips = kBlockN / kStripRows;
  static constexpr int kGroup = 8;  // row blocks that share weights
  static constexpr int kRowBytes = 2 * kBlockK;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * kRowBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  static_assert(2 * kBlockM * kUnits <= kSharedBytes && kSharedBytes <= 99 * 1024);
};

}  // namespace fuseformer
