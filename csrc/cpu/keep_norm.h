// Norms of edited rows, and rows that get their old norm back, on raw pointers: the contract is
// reft_kernels/ops/keep_norm.py.
//
// Sums are in double, in which no square of a float overflows or vanishes, and in an order that d
// alone decides. Written in plain lanes, for the compiler's own vectors: a row is read once or
// twice here, and the edit between has read it more often.
#pragma once

#include "intervene.h"

namespace reft {

struct KeepNorm {
  Matrix h;
  int64_t d;
  Dtype dtype;   // of h
  float* norms;  // [n], in the plan's order
  Plan plan;
};

struct KeepNormBackward {
  Matrix grad;  // like h
  Matrix hs;    // [n, d], the plan's rows before they were scaled
  Matrix dh;    // like grad
  int64_t d;
  Dtype dtype;  // of grad, hs and dh
  const float* norms;
  float* dnorms;  // [n]
  Plan plan;
};

// Writes the norms of a tile's rows.
void row_norms_tile(const KeepNorm& args, const Tile& tile);

// Scales a tile's rows to the norms.
void restore_norms_tile(const KeepNorm& args, const Tile& tile);

// dh and dnorms of a tile's rows.
void restore_norms_backward_tile(const KeepNormBackward& args, const Tile& tile);

}  // namespace reft
