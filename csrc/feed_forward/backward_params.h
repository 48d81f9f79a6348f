// What a launch of the resident regime's backward pass is told.
#pragma once

#include "params.h"

namespace fuseformer {

struct FeedForwardGradientParams {
  FeedForwardParams forward;  // but for y and b2
  Activation activation;
  RowTensor dy;  // like x
  RowTensor dx;  // like x
  void* dw1;     // (hidden, width), contiguous
  void* dw2;     // (width, hidden), contiguous
  void* db1;     // (hidden,), or null

  // Sums in float32: those of dx as the threads hold them, of the others by splits of the tokens.
  float* dx_sums;      // (dx_parts, steps, tokens of a step, width), zeros at first
  int* turns;          // (dx_parts, steps), zeros at first: how many blocks have added to dx
  float* weight_sums;  // (splits, 2, hidden, width): of dw1, and of dw2 transposed
  float* bias_sums;    // (splits, hidden)
  int splits;
  int dx_parts;  // block u of units adds to part u % dx_parts
};

}  // namespace fuseformer
