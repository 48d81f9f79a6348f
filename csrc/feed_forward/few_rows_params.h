// What launches of the few-rows regime are told.
#pragma once

#include "params.h"

namespace fuseformer {

// out = dropout(activation(x @ w.T + bias)), or with the gate x @ w_up.T; or, of the last product,
// x @ w.T + bias.
struct FewRowsParams {
  RowTensor x;       // (tokens, columns)
  RowTensor w;       // (units, columns)
  RowTensor w_up;    // like w, of gated first products
  RowTensor out;     // (tokens, units)
  RowTensor pre;     // like out, or null: the product with its bias, for the backward pass
  RowTensor up;      // the same of the product with w_up
  const void* bias;  // (units,), or null
  float* partial;    // (splits, tokens, units), or null where one part has all columns

  Activation activation;
  int tokens;
  int columns;  // a multiple of 8
  int units;    // a multiple of 8
  int splits;
  int split_columns;  // of each part but the last, whole chunks

  const int64_t* seed;  // of dropout, on the device: a captured graph may change it
  uint32_t dropout_threshold;
  float dropout_scale;
};

}  // namespace fuseformer
