// Checks of the ops' tensors, before anything is written. Messages name the argument, what it was
// and what is allowed. The contract is the docstring of reft_kernels/ops/schema.py.
#pragma once

#include <optional>

#include "intervene.h"
#include "scale_shift.h"
#include "tensors.h"

namespace reft {

// The rows of a tensor [..., d]: `count` of them, each of d contiguous elements.
struct Rows {
  Matrix matrix;
  int64_t count;
  int64_t d;
  Dtype dtype;
};

// Rows for reading: a copy is made (and kept in `holder`) where the strides do not allow otherwise.
Rows readable_rows(const Tensor& tensor, const char* name, Tensor* holder);

// Rows for writing in place: refuses strides that would need a copy, and rows that overlap one
// another.
Rows writable_rows(const Tensor& h, const char* name = "h");

// The rows of a tensor that is added to h and written, too: refuses one that is not like h, or that
// shares memory with it.
Rows writable_addend(const Tensor& addend, const Rows& h);

// Memory that the kernels read while they write h.
struct Region {
  const char* name;
  const void* data;
  int64_t bytes;
};

// The pool and the plan, checked against rows of width d and dtype `dtype`, of which there are
// `count`.
struct Checked {
  Pool pool;
  Plan plan;
  Region regions[7];
  int64_t pool_rows;
  int64_t positions;  // n, the length of `rows`
  int64_t tile_count;
  int64_t segments;
  int64_t max_rank;  // of the tiles with work
  int64_t work;  // Σ over tiles of rank · (count + 16) · d: products, and bytes from cold memory
};
Checked check_pool_and_plan(const Tensor& down, const Tensor& up, const Tensor& bias,
                            const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                            const Tensor& spans, const Rows& h);

// The same of an elementwise pool [P, d], which is left in `scales`; `pool` is not filled. Spans
// have rank 0 or 1.
struct CheckedScales : Checked {
  ScalePool scales;
};
CheckedScales check_scales_and_plan(const Tensor& scale_less_one, const Tensor& shift,
                                    const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                                    const Rows& h);

// The same of a plan without a pool, whose spans say by their rank alone what takes part, and of
// the norms [n] of its rows, unless these are null.
Checked check_plan(const Tensor& rows, const Tensor& tiles, const Tensor& spans, const Rows& h,
                   const Tensor* norms = nullptr);

// A source [n, s] for the rows of a plan, s at least the rank of its tiles. Refuses one that shares
// memory with h, where h is written.
Source check_source(const Tensor& source, const Checked& checked, const Rows* h = nullptr);

// The part of these checks that reads the plan; sets max_rank and work, from everything above them.
void check_values(Checked* checked, const Rows& h);

// Refuses h that shares memory with the pool or the plan.
void check_apart(const Rows& h, const Checked& checked);

// The norm of the rows of h; `out` is left to the caller. Refuses weights that do not fit h or
// share memory with it.
RowNorm check_norm(const Tensor& weight, const std::optional<Tensor>& shift, double eps,
                   int64_t norm, const Rows& h);

// Refuses a plan whose tiles do not name each of the rows of h once.
void check_cover(const Plan& plan, int64_t tile_count, int64_t rows);

}  // namespace reft
