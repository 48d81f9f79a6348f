// mma and ldmatrix, index by index as the tables of the PTX manual have them.
#include <cmath>

#include "../device/mma.h"
#include "state.h"

#define CALLER __builtin_return_address(0)

namespace fuseformer {

using namespace emulator;

namespace {

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// One k8 step of a model of a tensor core: products are aligned to the largest exponent, of which
// 24 bits are kept, and what is below is cut off. A guess at what hardware does, to see that
// results do not hang on the rounding.
float truncated_sum(float c, const float* a, const float (*b)[8], int column) {
  double terms[9] = {c};
  int exponent = -2000;
  for (int k = 0; k < 8; ++k) terms[k + 1] = static_cast<double>(a[k]) * b[k][column];
  for (double term : terms) {
    if (term != 0 && std::isfinite(term)) exponent = std::max(exponent, std::ilogb(term));
  }
  if (exponent == -2000) {
    double sum = 0;
    for (double term : terms) sum += term;
    return static_cast<float>(sum);
  }
  const double unit = std::ldexp(1.0, exponent - 23);
  double sum = 0;
  for (double term : terms) sum += std::isfinite(term) ? std::trunc(term / unit) * unit : term;
  const float rounded = static_cast<float>(sum);
  const bool grown = std::isfinite(sum) && std::fabs(rounded) > std::fabs(sum);
  return grown ? std::nextafter(rounded, 0.0f) : rounded;
}

template <int kDepth>
void multiply(float (&d)[16][8], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  const Rounding rounding = options().rounding;
  for (int i = 0; i < 16; ++i) {
    if (rounding == Rounding::kExact) {
      double sums[8];
      for (int j = 0; j < 8; ++j) sums[j] = d[i][j];
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(a[i][k]) * b[k][j];
      }
      for (int j = 0; j < 8; ++j) d[i][j] = static_cast<float>(sums[j]);
    } else if (rounding == Rounding::kChained) {
      for (int k = 0; k < kDepth; ++k) {
        for (int j = 0; j < 8; ++j) d[i][j] = std::fma(a[i][k], b[k][j], d[i][j]);
      }
    } else {
      for (int j = 0; j < 8; ++j) {
        for (int k = 0; k < kDepth; k += 8) d[i][j] = truncated_sum(d[i][j], &a[i][k], &b[k], j);
      }
    }
  }
}

// Adds a product to the accumulators that the lanes hold.
template <int kDepth>
void add_product(Product** lanes, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  ++report.counters.mma;
  float d[16][8];
  const auto of_lane = [&](int lane, int i) -> float& {
    return d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) of_lane(lane, i) = lanes[lane]->d[i];
  }
  multiply(d, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = of_lane(lane, i);
  }
}

// What a tensor core takes of a register: the lowest thirteen bits are not read.
float tf32_of(uint32_t bits) {
  bits &= ~0x1fffu;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <typename Element>
const float* widened() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) {
      values[bits] = to_float(Element{static_cast<uint16_t>(bits)});
    }
    return values;
  }();
  return table.data();
}

void load_matrices(uint32_t (&r)[4], SharedAddress row, bool transposed, const void* pc) {
  struct Argument {
    char* row;
    uint32_t* r;
    const void* pc;
    bool transposed;
  } argument{block.shared + row, r, pc, transposed};
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", argument, [](Argument** lanes) {
    ++report.counters.ldmatrix;
    uint16_t matrices[4][8][8];
    Thread* const last = current;
    for (int i = 0; i < 32; ++i) {
      char* const row = lanes[i]->row;
      current = &block.threads[last->number / 32 * 32 + i];
      if (reinterpret_cast<uintptr_t>(row) % 16) error("misaligned row of ldmatrix", lanes[i]->pc);
      if (!in_shared(row, 16)) {
        error("out of bounds: row of ldmatrix beside the shared memory", lanes[i]->pc);
        std::memset(matrices[i / 8][i % 8], 0xff, 16);
        continue;
      }
      if (instrumented) check_access(row, 16, Access::kRead, lanes[i]->pc);
      std::memcpy(matrices[i / 8][i % 8], row, 16);
    }
    current = last;
    for (int matrix = 0; matrix < 4; ++matrix) {
      int rows[8] = {}, most = 0;  // by the sixteen bytes of a bank row
      for (int i = 0; i < 8; ++i) {
        const char* const row = lanes[8 * matrix + i]->row;
        bool again = false;  // what several lanes point to is read once
        for (int j = 0; j < i; ++j) again |= lanes[8 * matrix + j]->row == row;
        const uintptr_t place = reinterpret_cast<uintptr_t>(row) / 16 % 8;
        if (!again) most = std::max(most, ++rows[place]);
      }
      report.counters.ldmatrix_conflicts += most - 1;
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto& m = matrices[matrix];
        const bool turned = lanes[lane]->transposed;
        const uint32_t low = turned ? m[2 * pair][group] : m[group][2 * pair];
        const uint32_t high = turned ? m[2 * pair + 1][group] : m[group][2 * pair + 1];
        lanes[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

}  // namespace

template <typename Element>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product product{d, a, {b0, b1}};
  collective("mma", product, [](Product** lanes) {
    const float* const wide = widened<Element>();
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const Product& mine = *lanes[lane];
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {  // of the columns of A
          const uint32_t packed = mine.a[2 * half + i];
          a[group + 8 * i][2 * pair + 8 * half] = wide[packed & 0xffff];
          a[group + 8 * i][2 * pair + 8 * half + 1] = wide[packed >> 16];
        }
        b[2 * pair + 8 * i][group] = wide[mine.b[i] & 0xffff];
        b[2 * pair + 8 * i + 1][group] = wide[mine.b[i] >> 16];
      }
    }
    add_product(lanes, a, b);
  });
}
template void mma_16x8x16<Bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_16x8x16<Half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product product{d, a, {b0, b1}};
  collective("mma.tf32", product, [](Product** lanes) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const Product& mine = *lanes[lane];
      for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {  // of the columns of A
          a[group + 8 * i][pair + 4 * half] = tf32_of(mine.a[2 * half + i]);
        }
        b[pair + 4 * i][group] = tf32_of(mine.b[i]);
      }
    }
    add_product(lanes, a, b);
  });
}

void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) { load_matrices(r, row, false, CALLER); }

void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  load_matrices(r, row, true, CALLER);
}

}  // namespace fuseformer
