// What launches of a gated block's gradient are told.
#pragma once

#include "params.h"

namespace fuseformer {

struct GatedGradientParams {
  RowTensor dact;      // (tokens, hidden); becomes the gradient of gate_pre
  RowTensor gate_pre;  // like dact, and so are the others: the first products
  RowTensor up;
  RowTensor dup;  // the gradient of up
  RowTensor act;  // the hidden activation, which the gradient of w_down needs

  Activation activation;
  int tokens;
  int hidden;  // a multiple of 8

  const int64_t* seed;  // of dropout, on the device: a captured graph may change it
  uint32_t dropout_threshold;
  float dropout_scale;
};

}  // namespace fuseformer
