// h[row] ← s ⊙ h[row] + v and its gradients, on raw pointers: the contract is
// reft_kernels/ops/scale_shift.py. No sum runs along a row, so that the compiler's own vectors do.
#pragma once

#include "intervene.h"

namespace reft {

// scale_less_one, shift: [P, d]. A span's first is its pool row, its rank 1, or 0 for nothing.
struct ScalePool {
  const float* scale_less_one;
  const float* shift;
};

struct ScaleShift {
  Matrix h;
  int64_t d;
  Dtype dtype;  // of h
  ScalePool pool;
  Plan plan;
};

struct ScaleShiftBackward {
  Matrix grad;  // like h
  Matrix hs;    // [n, d], the plan's rows of h
  Matrix dh;    // like grad
  int64_t d;
  Dtype dtype;  // of grad, hs and dh
  ScalePool pool;
  Plan plan;
};

void scale_shift_tile(const ScaleShift& args, const Tile& tile);

// dh of a tile's rows.
void scale_shift_backward_tile(const ScaleShiftBackward& args, const Tile& tile);

// ds and dv [d] of one pool row, columns [begin, end): over the terms in their order, and in each
// over the plan's rows in theirs.
void scale_shift_sums(const ScaleShiftBackward& args, const Range& range, int64_t begin,
                      int64_t end, float* ds, float* dv);

}  // namespace reft
