// What comes before and after the backward kernel: delta of each row, and dq out of its sums.
#pragma once

#include "../device/element.h"
#include "traits.h"
#include "workspace.h"

namespace fuseformer {

constexpr int kRowThreads = 128;

// The step of queries that a block of a grid of (steps * heads * batch,) takes.
struct QueryStep {
  int batch;
  int head;
  int row;           // the first one, in its sequence
  int64_t work_row;  // the same in the workspaces
};

template <int kBlockM>
FUSEFORMER_DEVICE QueryStep query_step(const AttentionGradientParams& given, int index) {
  const AttentionParams& params = given.forward;
  const int steps = (params.queries + kBlockM - 1) / kBlockM;
  QueryStep step;
  step.batch = index / (steps * params.heads);
  step.head = index / steps % params.heads;
  step.row = index % steps * kBlockM;
  step.work_row = static_cast<int64_t>(step.head) * given.workspace_rows +
                  workspace_row<kBlockM>(params, step.batch) + step.row;
  return step;
}

// Computes delta = rowsum(dout * out) - dlse and the lse in units of exp2. A row that sees nothing,
// or does not exist, gets an lse of +inf and delta 0: its probabilities come out as 0.
//
// Grid: (steps of queries * heads * batch,). Four threads take a row, as many rows at once as fit.
template <typename Traits>
__global__ void __launch_bounds__(kRowThreads)
    attention_delta_kernel(const AttentionGradientParams given) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  const AttentionParams& params = given.forward;
  const QueryStep step = query_step<kBlockM>(given, blockIdx.x);
  const int batch = step.batch, head = step.head, step_row = step.row;
  const int64_t work_row = step.work_row;
  const Sequence sequence = sequence_of(params, batch);
  if (step_row >= sequence.queries) return;
  const auto row_of = [&](const HeadTensor& tensor, int row) {
    return static_cast<const Element*>(tensor.data) + batch * tensor.batch_stride +
           head * tensor.head_stride + (sequence.first_query + row) * tensor.row_stride;
  };

  const int part = threadIdx.x % 4;
  for (int i = threadIdx.x / 4; i < kBlockM; i += kRowThreads / 4) {
    const int row = step_row + i;
    const bool exists = row < sequence.queries;
    float delta = 0.0f;
    if (exists) {
      const Element* out = row_of(params.out, row);
      const Element* dout = row_of(given.dout, row);
      for (int column = 8 * part; column < Traits::kHeadDim; column += 32) {
        Sixteen a, b;
        copy_16(&a, out + column);
        copy_16(&b, dout + column);
        FUSEFORMER_UNROLL
        for (int word = 0; word < 4; ++word) {
          delta += unpack<Element>(a.words[word], 0) * unpack<Element>(b.words[word], 0);
          delta += unpack<Element>(a.words[word], 1) * unpack<Element>(b.words[word], 1);
        }
      }
    }
    delta = row_sum(delta);
    if (part != 0) continue;
    float lse = kMinusInfinity;
    if (exists) {
      const int64_t place = batch * params.lse_batch_stride + head * params.lse_head_stride +
                            sequence.first_query + row;
      lse = params.lse[place];
      if (given.dlse != nullptr) delta -= given.dlse[place];
    }
    const bool empty = lse == kMinusInfinity;
    given.lse_log2[work_row + i] = empty ? -kMinusInfinity : lse * 1.44269504f;
    given.delta[work_row + i] = empty ? 0.0f : delta;
  }
}

// Writes dq, the sums times the scale, rounded. The sums of a step lie as the threads of the
// backward kernel hold them.
//
// Grid: (steps of queries * heads * batch,), as many threads as the backward kernel has.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    attention_finish_kernel(const AttentionGradientParams given) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM, kRowTiles = kBlockM / 16;
  const AttentionParams& params = given.forward;
  const QueryStep step = query_step<kBlockM>(given, blockIdx.x);
  const int batch = step.batch, head = step.head, step_row = step.row;
  const int64_t work_row = step.work_row;
  const Sequence sequence = sequence_of(params, batch);
  if (step_row >= sequence.queries) return;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const float* sums = given.dq_sums + work_row * Traits::kHeadDim + thread;
  const int row = step_row + warp % kRowTiles * 16 + lane / 4;
  const int column = warp / kRowTiles * 16 + lane % 4 * 2;
  FUSEFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= sequence.queries) continue;
    Element* dq = static_cast<Element*>(given.dq.data) + batch * given.dq.batch_stride +
                  head * given.dq.head_stride +
                  (sequence.first_query + row + 8 * half) * given.dq.row_stride + column;
    FUSEFORMER_UNROLL
    for (int i = 0; i < 2 * Traits::kColumnSteps; ++i) {
      const int first = (4 * i + 2 * half) * Traits::kThreads;
      *reinterpret_cast<uint32_t*>(dq + i / 2 * 16 * Traits::kColumnGroups + i % 2 * 8) =
          pack<Element>(sums[first] * params.scale, sums[first + Traits::kThreads] * params.scale);
    }
  }
}

}  // namespace fuseformer
