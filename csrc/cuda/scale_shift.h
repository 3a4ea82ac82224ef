// The elementwise CUDA kernels, on raw device pointers: h[row] ← s ⊙ h[row] + v, and its gradients.
// Tensors and tables are those of reft_kernels/ops/scale_shift.py, as in ../cpu/scale_shift.h.
#pragma once

#include "../cpu/scale_shift.h"
#include "intervene.h"

namespace reft::cuda {

// Columns of d that one block of a kernel takes.
constexpr int64_t kScaleColumns = 1024, kScaleSumColumns = 64;

struct ScaleShiftCall : ScaleShift {
  int64_t row_count;  // rows of h; a plan row beyond them is skipped
  int64_t tile_count;
};

struct ScaleShiftBackwardCall : ScaleShiftBackward {
  int64_t row_count;
  int64_t tile_count;
  int64_t pool_rows;
  int64_t segments;
  const int32_t* offsets;          // [segments + 1]
  float *scale_grad, *shift_grad;  // [P, d]
};

// Null, or what went wrong, by CUDA's own name for it.
const char* launch_scale_shift(const ScaleShiftCall& call, cudaStream_t stream);

// dh of the edited rows; the others must hold a copy of grad before.
const char* launch_scale_shift_rows(const ScaleShiftBackwardCall& call, cudaStream_t stream);

// Gradients of all pool rows, zeros where no row used them.
const char* launch_scale_shift_sums(const ScaleShiftBackwardCall& call, cudaStream_t stream);

}  // namespace reft::cuda
