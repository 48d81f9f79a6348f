// Products on tensor cores, and the loads that bring their operands from shared memory.
//
// Fragments, with group = lane / 4 and pair = lane % 4 (PTX manual, "Matrix multiply-accumulate
// operation using mma instruction", m16n8k16):
//
//   A (16 x 16)  a[0]: row group,     columns 2 pair, 2 pair + 1     a[2]: the same, columns + 8
//                a[1]: row group + 8, columns 2 pair, 2 pair + 1     a[3]: the same, columns + 8
//   B (16 x 8)   b[0]: rows 2 pair, 2 pair + 1, column group         b[1]: the same, rows + 8
//   D (16 x 8)   d[0], d[1]: row group,     columns 2 pair, 2 pair + 1
//                d[2], d[3]: row group + 8, columns 2 pair, 2 pair + 1
//
// so that two neighbouring D tiles, packed, are an A operand of the next product. In tf32, m16n8k8,
// with the same D, a register holds one number:
//
//   A (16 x 8)   a[0]: row group,     column pair                    a[2]: the same, column + 4
//                a[1]: row group + 8, column pair                    a[3]: the same, column + 4
//   B (8 x 8)    b[0]: row pair, column group                        b[1]: the same, row + 4
#pragma once

#include "element.h"

namespace fuseformer {

#if defined(__CUDACC__)

// d += a * b, 16 x 8 x 16, in float32.
template <typename Element>
FUSEFORMER_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FUSEFORMER_DEVICE void mma_16x8x16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FUSEFORMER_DEVICE void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a * b, 16 x 8 x 8, of what `to_tf32` has rounded, in float32.
FUSEFORMER_DEVICE void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Loads four 8 x 8 matrices of 16-bit numbers. Lane 8 i + r gives the address of row r of matrix i,
// 16 bytes, aligned to 16. In r[i] a lane gets columns 2 pair and 2 pair + 1 of row `group`.
FUSEFORMER_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same with each matrix transposed: a lane gets rows 2 pair and 2 pair + 1 of column `group`.
FUSEFORMER_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#else

template <typename Element>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row);
void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row);

#endif

// The accumulators of tiles 2 * step and 2 * step + 1, rounded, as an operand A.
template <typename Element, int kTiles>
FUSEFORMER_DEVICE void as_operand(uint32_t (&a)[4], const float (&d)[kTiles][4], int step) {
  a[0] = pack<Element>(d[2 * step][0], d[2 * step][1]);
  a[1] = pack<Element>(d[2 * step][2], d[2 * step][3]);
  a[2] = pack<Element>(d[2 * step + 1][0], d[2 * step + 1][1]);
  a[3] = pack<Element>(d[2 * step + 1][2], d[2 * step + 1][3]);
}

}  // namespace fuseformer
