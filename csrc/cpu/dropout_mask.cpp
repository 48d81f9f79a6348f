#include "dropout_mask.h"

#include <algorithm>
#include <cstring>

#include "../device/philox.h"

// One body, compiled for several instruction sets: the loader takes the best that there is.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FUSEFORMER_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FUSEFORMER_CLONES
#endif

namespace fuseformer {
namespace {

constexpr int kGroups = 16;             // of 32 columns, that are decided at a time, at most
constexpr int kCounters = 8 * kGroups;  // a row and eight columns to the right of it need one each

// Decides rows `row` and `row + 8` of `groups` times 32 columns, the first being 32 * column_group.
FUSEFORMER_CLONES void decide(PhiloxKey key, uint32_t threshold, uint32_t batch, uint32_t head,
                              uint32_t row, uint32_t column_group, int groups, uint8_t* upper,
                              uint8_t* lower) {
  const int counters = 8 * groups;
  uint32_t words[4][kCounters];
  for (int i = 0; i < counters; ++i) {
    uint32_t four[4];
    philox(four, key, 8 * column_group + i, row, head, batch);
    for (int j = 0; j < 4; ++j) words[j][i] = four[j];
  }
  for (int j = 0; j < 4; ++j) {
    uint8_t kept[2][kCounters];
    for (int i = 0; i < counters; ++i) kept[0][i] = is_kept(words[j][i], 0, threshold);
    for (int i = 0; i < counters; ++i) kept[1][i] = is_kept(words[j][i], 1, threshold);
    // Words take turns every eight columns.
    for (int group = 0; group < groups; ++group) {
      std::memcpy(upper + 32 * group + 8 * j, &kept[0][8 * group], 8);
      std::memcpy(lower + 32 * group + 8 * j, &kept[1][8 * group], 8);
    }
  }
}

}  // namespace

int64_t dropout_row_groups(const DropoutMaskParams& params) {
  if (params.rows == 0) return 0;
  return (params.first_row + params.rows + 15) / 16 - params.first_row / 16;
}

void write_dropout_mask(const DropoutMaskParams& params, int64_t batch, int64_t head, int64_t group,
                        uint8_t* keep) {
  const PhiloxKey key{static_cast<uint32_t>(params.seed), static_cast<uint32_t>(params.seed >> 32)};
  const int64_t first = (params.first_row / 16 + group) * 16;  // of the sixteen rows
  const int64_t end = params.first_column + params.columns;
  uint8_t decided[2][32 * kGroups];
  for (int i = 0; i < 8; ++i) {
    for (int64_t column = params.first_column / 32 * 32; column < end; column += 32 * kGroups) {
      const int groups = static_cast<int>(std::min<int64_t>(kGroups, (end - column + 31) / 32));
      decide(key, params.threshold, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
             static_cast<uint32_t>(first / 2 + i), static_cast<uint32_t>(column / 32), groups,
             decided[0], decided[1]);
      const int64_t from = std::max(column, params.first_column);
      const int64_t count = std::min(column + 32 * kGroups, end) - from;
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first + i + 8 * half - params.first_row;
        if (row < 0 || row >= params.rows) continue;
        std::memcpy(keep + row * params.columns + from - params.first_column,
                    decided[half] + from - column, count);
      }
    }
  }
}

}  // namespace fuseformer
