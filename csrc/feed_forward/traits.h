// Tile sizes of the feed-forward kernels: they live here alone.
//
// A warp owns whole rows, and holds their tokens and their output: at width 256 those of sixteen
// rows are three quarters of its registers. At less, 32 rows would halve what is loaded from shared
// memory, but leave no registers to overlap activations and random words with products.
#pragma once

namespace fuseformer {

template <typename Element_, int kWidth_, int kBlockM_, int kBlockH_, int kWarps_>
struct FeedForwardTraits {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kBlockM = kBlockM_;  // tokens of a block
  static constexpr int kBlockH = kBlockH_;  // hidden units of a step
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kBlockM / kWarps / 16;  // sixteens of rows that a warp owns
  static constexpr int kTokenBytes = 2 * kWidth * kBlockM;
  static constexpr int kWeightBytes = 2 * kWidth * kBlockH;  // of a step, of either matrix
  static constexpr int kStageBytes = 2 * kWeightBytes;
  static constexpr int kBiasBytes = 2 * kBlockH;
  // Tokens lie where the second stage will: by then they are in registers.
  static constexpr int kTileBytes =
      kStageBytes + (kTokenBytes > kStageBytes ? kTokenBytes : kStageBytes);
  static constexpr int kSharedBytes = kTileBytes + 2 * kBiasBytes;
  static_assert(kRowTiles * kWarps * 16 == kBlockM && kBlockH % 32 == 0 && kWidth % 32 == 0);
  static_assert(kSharedBytes <= 99 * 1024);  // what a block may have on every GPU from sm_80 on
};

template <typename Element, int kWidth>
struct FeedForwardConfig;
template <typename Element>
struct FeedForwardConfig<Element, 64> : FeedForwardTraits<Element, 64, 128, 64, 8> {};
template <typename Element>
struct FeedForwardConfig<Element, 128> : FeedForwardTraits<Element, 128, 128, 64, 8> {};
template <typename Element>
struct FeedForwardConfig<Element, 256> : FeedForwardTraits<Element, 256, 64, 32, 4> {};

}  // namespace fuseformer
