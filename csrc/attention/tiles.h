// The tiles of the attention kernels, for people and for tests: what `traits.h` says, at run time.
#pragma once

#include <vector>

#include "../tile_row.h"
#include "traits.h"

namespace fuseformer {

template <typename Traits>
TileRow tile_row(const char* kernel) {
  return {kernel,           Traits::kHeadDim, Traits::kBlockM,     Traits::kBlockN,
          Traits::kThreads, Traits::kStages,  Traits::kSharedBytes};
}

template <typename Traits>
TileRow decode_row() {
  return {"decode",         Traits::kHeadDim, Traits::kRows,       Traits::kBlockN,
          Traits::kThreads, Traits::kStages,  Traits::kSharedBytes};
}

inline std::vector<TileRow> attention_tiles() {
  using Element = void;  // sizes are those of any 16-bit number
  return {
      tile_row<ForwardConfig<Element, 32>>("forward"),
      tile_row<ForwardConfig<Element, 64>>("forward"),
      tile_row<ForwardConfig<Element, 96>>("forward"),
      tile_row<ForwardConfig<Element, 128>>("forward"),
      tile_row<ForwardConfig<Element, 256>>("forward"),
      tile_row<BackwardConfig<Element, 32>>("backward"),
      tile_row<BackwardConfig<Element, 64>>("backward"),
      tile_row<BackwardConfig<Element, 96>>("backward"),
      tile_row<BackwardConfig<Element, 128>>("backward"),
      tile_row<BackwardConfig<Element, 256>>("backward"),
      tile_row<SmallBackwardConfig<Element, 96>>("backward small"),
      tile_row<SmallBackwardConfig<Element, 128>>("backward small"),
      tile_row<SmallBackwardConfig<Element, 256>>("backward small"),
      decode_row<DecodeTraits<Element, 32>>(),
      decode_row<DecodeTraits<Element, 64>>(),
      decode_row<DecodeTraits<Element, 96>>(),
      decode_row<DecodeTraits<Element, 128>>(),
      decode_row<DecodeTraits<Element, 256>>(),
  };
}

}  // namespace fuseformer
