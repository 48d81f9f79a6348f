// Tile sizes of the epilogue regime: they live here alone.
#pragma once

namespace fuseformer {

// Eight warps of 64 x 64: each fragment that a warp loads feeds four or eight products. A block has
// a multiprocessor for itself.
template <typename Element_>
struct LinearTraits {
  using Element = Element_;
  static constexpr int kBlockM = 128;  // tokens of a block
  static constexpr int kBlockN = 256;  // hidden units of a block
  static constexpr int kBlockK = 64;   // columns of a step
  static constexpr int kWarps = 8;
  static constexpr int kWarpRows = 2;  // warps below each other
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kBlockM / kWarpRows / 16;
  static constexpr int kColumnTiles = kBlockN / (kWarps / kWarpRows) / 8;
  static constexpr int kGroup = 8;  // row blocks that share weights
  static constexpr int kRowBytes = 2 * kBlockK;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * kRowBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  static_assert(2 * kBlockM * kBlockN <= kSharedBytes && kSharedBytes <= 99 * 1024);
};

}  // namespace fuseformer
