// Tile sizes of the resident regime's backward pass: they live here alone.
#pragma once

#include "../device/platform.h"

namespace fuseformer {

// The shared memory that a block may have on every GPU from sm_80 on.
constexpr int kBackwardLeastShared = 99 * 1024;

// A block owns hidden units and walks over steps of tokens. Of each product its warps share the
// result as tiles that are as square as they can be: what they load from shared memory is least.
template <typename Element_, int kWidth_, int kBlockM_, int kBlockH_, int kTokenWarps_,
          int kUnitWarps_, int kStages_>
struct FeedForwardBackwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kBlockM = kBlockM_;  // tokens of a step
  static constexpr int kBlockH = kBlockH_;  // hidden units of a block
  static constexpr int kStages = kStages_;  // tiles of tokens, and of dy
  static constexpr int kWarps = kTokenWarps_ * kUnitWarps_;
  static constexpr int kThreads = 32 * kWarps;

  // The hidden tile: warps below each other, warps beside each other, and what each has of it.
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kUnitWarps = kUnitWarps_;
  static constexpr int kRowTiles = kBlockM / kTokenWarps / 16;
  static constexpr int kUnitTiles = kBlockH / kUnitWarps / 8;
  // The gradients of its rows are computed in parts where both at once would take the registers
  // that narrow weights leave free.
  static constexpr int kDyParts = kWidth > 64 ? kRowTiles : 1;
  static constexpr int kDyPartTiles = kRowTiles / kDyParts;
  // The same of dx of a step.
  static constexpr int kDxRowTiles = 2;
  static constexpr int kDxRowWarps = kBlockM / 16 / kDxRowTiles;
  static constexpr int kDxColumnTiles = kWidth / (kWarps / kDxRowWarps) / 8;
  static constexpr int kDxParts = kDxColumnTiles <= 4 ? 1
                                  : kBlockM < 64      ? 4
                                                      : 2;  // that follow each other
  static constexpr int kDxPartTiles = kDxColumnTiles / kDxParts;
  // Where a tile is among the sums of dx that a thread has: part after part.
  static constexpr FUSEFORMER_DEVICE int dx_place(int row_tile, int column_tile) {
    return (column_tile / kDxPartTiles * kDxRowTiles + row_tile) * kDxPartTiles +
           column_tile % kDxPartTiles;
  }
  // The same of the weight gradients: half of the warps have dw1, the others dw2 transposed.
  static constexpr int kWeightWarps = kWarps / 2;
  static constexpr int kWeightRowTiles = kBlockH < 64 ? 2 : 4;
  static constexpr int kWeightRowWarps = kBlockH / 16 / kWeightRowTiles;
  static constexpr int kWeightColumnTiles = kWidth / (kWeightWarps / kWeightRowWarps) / 8;
  static constexpr int kBiasTiles = kWeightRowTiles * kWeightRowWarps / kWeightWarps;

  static constexpr int kWeightBytes = 2 * kBlockH * kWidth;  // of either matrix
  static constexpr int kTokenBytes = 2 * kBlockM * kWidth;
  static constexpr int kHiddenBytes = 2 * kBlockM * kBlockH;
  // Offsets in shared memory: both weights, the tokens of all stages and as much of dy, the hidden
  // activations and their gradients, b1 in float32, its sums.
  static constexpr int kTokenOffset = 2 * kWeightBytes;
  static constexpr int kDyOffset = kTokenOffset + kStages * kTokenBytes;
  static constexpr int kHiddenOffset = kDyOffset + kStages * kTokenBytes;
  static constexpr int kBiasOffset = kHiddenOffset + 2 * kHiddenBytes;
  static constexpr int kBiasSumOffset = kBiasOffset + 4 * kBlockH;
  static constexpr int kBiasSums = kWarps * kBiasTiles * 16;
  static constexpr int kOrderOffset = kBiasSumOffset + 4 * kBiasSums;  // three numbers of the block
  static constexpr int kSharedBytes = kOrderOffset + 16;

  static_assert(kTokenWarps * kRowTiles * 16 == kBlockM && kUnitWarps * kUnitTiles * 8 == kBlockH);
  static_assert(kDxRowWarps * kDxRowTiles * 16 == kBlockM &&
                kWarps / kDxRowWarps * kDxColumnTiles * 8 == kWidth);
  static_assert(kWeightRowWarps * kWeightRowTiles * 16 == kBlockH &&
                kWeightWarps / kWeightRowWarps * kWeightColumnTiles * 8 == kWidth &&
                kBiasTiles * kWeightWarps == kWeightRowTiles * kWeightRowWarps);
};

template <typename Element, int kWidth>
struct FeedForwardBackwardConfig;
template <typename Element>
struct FeedForwardBackwardConfig<Element, 64>
    : FeedForwardBackwardTraits<Element, 64, 64, 128, 2, 4, 2> {};
template <typename Element>
struct FeedForwardBackwardConfig<Element, 128>
    : FeedForwardBackwardTraits<Element, 128, 64, 128, 2, 4, 2> {};
template <typename Element>
struct FeedForwardBackwardConfig<Element, 256>
    : FeedForwardBackwardTraits<Element, 256, 64, 64, 4, 2, 1> {};

// What fits into kBackwardLeastShared where those above do not.
template <typename Element, int kWidth>
struct SmallFeedForwardBackwardConfig;
template <typename Element>
struct SmallFeedForwardBackwardConfig<Element, 128>
    : FeedForwardBackwardTraits<Element, 128, 64, 64, 4, 2, 1> {};
template <typename Element>
struct SmallFeedForwardBackwardConfig<Element, 256>
    : FeedForwardBackwardTraits<Element, 256, 32, 32, 2, 2, 1> {};

}  // namespace fuseformer
