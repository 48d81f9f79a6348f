// Which elements dropout keeps, on the CPU: the mask of `fuseformer.philox`.
#pragma once

#include <cstdint>

namespace fuseformer {

struct DropoutMaskParams {
  uint64_t seed;
  uint32_t threshold;  // of 65,536: smaller numbers are dropped
  int64_t first_row, rows;
  int64_t first_column, columns;
};

// The rows of one head come in sixteens that are decided together: how many of those there are.
int64_t dropout_row_groups(const DropoutMaskParams& params);

// Writes what is kept, 1 or 0, of one such group of rows of a head; `keep` is the head's first
// element, and its rows are contiguous.
void write_dropout_mask(const DropoutMaskParams& params, int64_t batch, int64_t head, int64_t group,
                        uint8_t* keep);

}  // namespace fuseformer
