// The tiles of the feed-forward kernels, for people and for tests: what their traits say, at run
// time.
#pragma once

#include <vector>

#include "../tile_row.h"
#include "backward_traits.h"
#include "few_rows_traits.h"
#include "linear_traits.h"
#include "traits.h"

namespace fuseformer {

template <typename Traits>
TileRow resident_row() {
  constexpr int kStages = 2;
  return {"feed-forward",   Traits::kWidth, Traits::kBlockM,     Traits::kBlockH,
          Traits::kThreads, kStages,        Traits::kSharedBytes};
}

template <typename Traits>
TileRow resident_backward_row(const char* kernel) {
  return {kernel,           Traits::kWidth,  Traits::kBlockM,     Traits::kBlockH,
          Traits::kThreads, Traits::kStages, Traits::kSharedBytes};
}

template <int kMatrices>
TileRow linear_row(const char* kernel) {
  using Traits = LinearTraits<void, kMatrices>;
  constexpr int kStages = 2;
  return {kernel,           kMatrices, Traits::kBlockM,     Traits::kUnits,
          Traits::kThreads, kStages,   Traits::kSharedBytes};
}

template <int kMatrices>
TileRow few_rows_row(const char* kernel) {
  using Traits = FewRowsTraits<void, kMatrices>;
  return {kernel,           kMatrices,       Traits::kRows,       Traits::kUnits,
          Traits::kThreads, Traits::kStages, Traits::kSharedBytes};
}

inline std::vector<TileRow> feed_forward_tiles() {
  using Element = void;  // sizes are those of any 16-bit number
  const char* const small = "feed-forward backward small";
  return {
      resident_row<FeedForwardConfig<Element, 64>>(),
      resident_row<FeedForwardConfig<Element, 128>>(),
      resident_row<FeedForwardConfig<Element, 256>>(),
      resident_backward_row<FeedForwardBackwardConfig<Element, 64>>("feed-forward backward"),
      resident_backward_row<FeedForwardBackwardConfig<Element, 128>>("feed-forward backward"),
      resident_backward_row<FeedForwardBackwardConfig<Element, 256>>("feed-forward backward"),
      resident_backward_row<SmallFeedForwardBackwardConfig<Element, 128>>(small),
      resident_backward_row<SmallFeedForwardBackwardConfig<Element, 256>>(small),
      linear_row<1>("linear"),
      linear_row<2>("linear"),
      few_rows_row<1>("few-rows hidden"),
      few_rows_row<2>("few-rows hidden"),
      few_rows_row<1>("few-rows output"),
  };
}

}  // namespace fuseformer
