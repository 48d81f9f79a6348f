// Tiles of 16-bit numbers in shared memory, swizzled so that no access has a bank conflict.
//
// A row is kColumns numbers, in chunks of 16 bytes. The eight rows of an 8 x 8 matrix lie at one
// chunk of eight rows, and must fall into eight different sixteens of bytes of the 128 that a bank
// row has: chunk c of row r is stored at chunk c ^ swizzle(r). A tile begins at a multiple of 128
// bytes.
#pragma once

#include "copy.h"
#include "mma.h"

namespace fuseformer {

template <int kColumns>
struct Tile {
  static constexpr int kRowBytes = 2 * kColumns;
  static constexpr int kChunks = kColumns / 8;
  // Rows of an odd multiple of 64 bytes alternate between the halves of a bank row by themselves.
  static constexpr bool kWhole = kRowBytes % 128 == 0;
  // Steps of two chunks after which offsets repeat, but for whole bank rows.
  static constexpr int kPhases = kWhole ? 4 : 2;

  static FUSEFORMER_DEVICE int swizzle(int row) { return kWhole ? row & 7 : row >> 1 & 3; }

  static FUSEFORMER_DEVICE int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }
};

// Where a lane points `ldmatrix` to, for the sixteens of rows and columns of a tile.
//
// In row order the four matrices are the operand A of a product, or B transposed: rows 0 to 7, then
// 8 to 15, of the first eight columns, then of the others. In column order they are two operands B
// as they lie in memory: both column halves of rows 0 to 7, then of rows 8 to 15.
template <int kColumns>
struct LaneAddresses {
  using Layout = Tile<kColumns>;
  SharedAddress phase[Layout::kPhases];

  LaneAddresses() = default;

  // Columns count from 16 * first_step on.
  FUSEFORMER_DEVICE static LaneAddresses in_row_order(SharedAddress tile, int lane,
                                                      int first_step = 0) {
    return LaneAddresses(tile, lane & 15, 2 * first_step + (lane >> 4));
  }

  FUSEFORMER_DEVICE static LaneAddresses in_column_order(SharedAddress tile, int lane,
                                                         int first_step = 0) {
    return LaneAddresses(tile, (lane & 7) + (lane >> 4) * 8, 2 * first_step + (lane >> 3 & 1));
  }

  // Sixteen rows from 16 * row_step on, sixteen columns from 16 * column_step on.
  FUSEFORMER_DEVICE SharedAddress at(int row_step, int column_step) const {
    return phase[column_step % Layout::kPhases] + row_step * 16 * Layout::kRowBytes +
           column_step / Layout::kPhases * Layout::kPhases * 32;
  }

  // Has the other phases computed from the first one in every step of a loop, where the registers
  // that would keep them are needed. Steps that are added to a smaller first one without a carry
  // are an exclusive or.
  FUSEFORMER_DEVICE void compute_phases_again() {
    compute_again(phase[0]);
    FUSEFORMER_UNROLL
    for (int i = 1; i < Layout::kPhases; ++i) phase[i] = phase[0] ^ i * 32;
  }

 private:
  FUSEFORMER_DEVICE LaneAddresses(SharedAddress tile, int row, int chunk) {
    FUSEFORMER_UNROLL
    for (int i = 0; i < Layout::kPhases; ++i) phase[i] = tile + Layout::offset(row, chunk + 2 * i);
  }
};

// The part of one thread in copying kRows rows from global memory into a tile.
template <int kColumns, int kRows, int kThreads>
struct TileCopy {
  using Layout = Tile<kColumns>;
  // Neighbouring threads copy neighbouring chunks of a row: all of them, or as many as the swizzle
  // exchanges among each other.
  static constexpr bool kPower = (Layout::kChunks & (Layout::kChunks - 1)) == 0;
  static constexpr int kAcross = kPower ? Layout::kChunks : Layout::kWhole ? 8 : 4;
  static constexpr int kRowsAtOnce = kThreads / kAcross;
  static constexpr int kPasses = kRows / kRowsAtOnce;
  static_assert(kPasses * kRowsAtOnce == kRows && Layout::kChunks % kAcross == 0);

  int row;          // of the first pass
  int first_chunk;  // in it
  uint32_t target;  // its offset in a tile
  int64_t start;    // bytes from row 0 of the tensor to it
  int64_t step;     // bytes from one pass to the next

  FUSEFORMER_DEVICE TileCopy(int thread, int64_t row_stride) {
    row = thread / kAcross;
    first_chunk = thread % kAcross;
    target = Layout::offset(row, thread % kAcross);
    start = 2 * (row * row_stride + thread % kAcross * 8);
    step = 2 * kRowsAtOnce * row_stride;
  }

  // Begins to copy the rows that `source` points to the first of.
  FUSEFORMER_DEVICE void begin(SharedAddress tile, const char* source) const {
    source += start;
    FUSEFORMER_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, source += step) {
      FUSEFORMER_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kAcross) {
        copy_async_16(tile + target_of(pass, chunk), source + 16 * chunk);
      }
    }
  }

  // The same if `wanted`, without a branch, for a source that `start` has been added to: a pointer
  // that a loop moves on.
  FUSEFORMER_DEVICE void begin_if(SharedAddress tile, const char* source, bool wanted) const {
    FUSEFORMER_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, source += step) {
      FUSEFORMER_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kAcross) {
        copy_async_16_if(tile + target_of(pass, chunk), source + 16 * chunk, wanted);
      }
    }
  }

  // The same for rows of which only the first `rows` exist: the others become zeros.
  FUSEFORMER_DEVICE void begin_bounded(SharedAddress tile, const char* source, int rows) const {
    source += start;
    FUSEFORMER_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, source += step) {
      const bool exists = row + pass * kRowsAtOnce < rows;
      FUSEFORMER_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kAcross) {
        copy_async_16_or_zero(tile + target_of(pass, chunk), source + 16 * chunk, exists);
      }
    }
  }

  // The same for columns, of which the first `columns`, a multiple of eight, exist.
  FUSEFORMER_DEVICE void begin_narrow(SharedAddress tile, const char* source, int columns) const {
    source += start;
    FUSEFORMER_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, source += step) {
      FUSEFORMER_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kAcross) {
        const bool exists = 8 * (chunk + first_chunk) < columns;
        copy_async_16_or_zero(tile + target_of(pass, chunk), source + 16 * chunk, exists);
      }
    }
  }

  // The same for both.
  FUSEFORMER_DEVICE void begin_corner(SharedAddress tile, const char* source, int rows,
                                      int columns) const {
    source += start;
    FUSEFORMER_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, source += step) {
      FUSEFORMER_UNROLL
      for (int chunk = 0; chunk < Layout::kChunks; chunk += kAcross) {
        const bool exists = row + pass * kRowsAtOnce < rows && 8 * (chunk + first_chunk) < columns;
        copy_async_16_or_zero(tile + target_of(pass, chunk), source + 16 * chunk, exists);
      }
    }
  }

 private:
  // Passes of fewer than eight rows change the swizzle; `target` is below them in those bits.
  FUSEFORMER_DEVICE uint32_t target_of(int pass, int chunk) const {
    return (target ^ Layout::swizzle(pass * kRowsAtOnce) << 4) +
           pass * kRowsAtOnce * Layout::kRowBytes + chunk * 16;
  }
};

}  // namespace fuseformer
