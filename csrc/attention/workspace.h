// Where the backward pass keeps what it needs for each row of queries.
#pragma once

#include "mask.h"

namespace fuseformer {

// The first row of a sequence in the workspaces: packed ones begin at a whole step behind the last.
template <int kBlockM>
FUSEFORMER_DEVICE int workspace_row(const AttentionParams& params, int batch) {
  if (params.cu_seqlens_q != nullptr) {
    return (params.cu_seqlens_q[batch] / kBlockM + batch) * kBlockM;
  }
  return batch * ((params.queries + kBlockM - 1) / kBlockM) * kBlockM;
}

}  // namespace fuseformer
