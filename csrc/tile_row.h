// A line of the table of tiles.
#pragma once

#include <string>

namespace fuseformer {

struct TileRow {
  std::string kernel;  // "... small" for GPUs of less shared memory
  int size;            // head dim, model width, or first products of a block: 2 of a gated one
  int block_m;         // rows of a tile: queries, tokens
  int block_n;         // columns of it: keys, hidden units
  int threads;
  int stages;
  int shared_bytes;
};

}  // namespace fuseformer
