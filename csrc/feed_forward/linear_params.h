// What launches of the epilogue regime are told: a product that ends in the activation, or two in
// the activation of one times the other, and the gradient that goes back through the former.
#pragma once

#include "params.h"

namespace fuseformer {

// Rows that one block of `activation_gradient_kernel` sums for the bias gradient: the sums are then
// 1/64 of what it reads.
constexpr int kGradientRows = 256;

struct LinearParams {
  RowTensor x;       // (tokens, width)
  RowTensor w;       // (hidden, width)
  RowTensor w_up;    // like w, its stride too: of a gated block
  RowTensor act;     // (tokens, hidden)
  RowTensor pre;     // like act, or null: the product with its bias, for the backward pass
  RowTensor up;      // the same of the product with w_up
  const void* bias;  // (hidden,), or null; a gated block has none

  Activation activation;
  int tokens;
  int width;   // a multiple of 8
  int hidden;  // a multiple of 8

  const int64_t* seed;  // of dropout, on the device: a captured graph may change it
  uint32_t dropout_threshold;
  float dropout_scale;
};

struct ActivationGradientParams {
  Activation activation;
  RowTensor dact;  // (tokens, hidden); becomes the gradient before the activation
  RowTensor pre;   // like dact; becomes the activation, which the gradient of w2 needs
  float* dbias;    // (row blocks, hidden), sums of rows, or null

  int tokens;
  int hidden;  // a multiple of 8

  const int64_t* seed;
  uint32_t dropout_threshold;
  float dropout_scale;
};

}  // namespace fuseformer
