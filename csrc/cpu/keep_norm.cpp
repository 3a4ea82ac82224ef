#include "keep_norm.h"

#include <cmath>

#include "vec_scalar.h"

namespace reft {
namespace {

template <class H>
H* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<H*>(matrix.data) + row * matrix.stride;
}

// Σ x ⊙ y
template <class H>
double dot(const H* x, const H* y, int64_t d) {
  constexpr int64_t kLanes = 8;
  double sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes)
    for (int64_t i = 0; i < kLanes; ++i)
      sums[i] += double{widen(x[j + i])} * double{widen(y[j + i])};
  for (int64_t i = 0; j < d; ++i, ++j) sums[i] += double{widen(x[j])} * double{widen(y[j])};
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <class H>
double norm_of(const H* x, int64_t d) {
  return std::sqrt(dot(x, x, d));
}

// body(place, row) for the rows of a tile.
template <class Body>
void each_row(const Plan& plan, const Tile& tile, const Body& body) {
  for (int64_t i = tile.start; i < int64_t{tile.start} + tile.count; ++i) {
    if (plan.rows[i] >= 0) body(i, plan.rows[i]);
  }
}

template <class H>
void norms(const KeepNorm& a, const Tile& tile) {
  each_row(a.plan, tile, [&](int64_t place, int64_t row) {
    a.norms[place] = static_cast<float>(norm_of(row_of<const H>(a.h, row), a.d));
  });
}

template <class H>
void restore(const KeepNorm& a, const Tile& tile) {
  each_row(a.plan, tile, [&](int64_t place, int64_t row) {
    H* const y = row_of<H>(a.h, row);
    const double length = norm_of(static_cast<const H*>(y), a.d);
    if (length == 0 || static_cast<float>(length) == a.norms[place]) return;
    const double factor = a.norms[place] / length;
    for (int64_t j = 0; j < a.d; ++j) narrow(y + j, static_cast<float>(widen(y[j]) * factor));
  });
}

// dh = norm / ‖y‖ · (g − y (y·g) / ‖y‖²), dnorm = y·g / ‖y‖
template <class H>
void backward(const KeepNormBackward& a, const Tile& tile) {
  each_row(a.plan, tile, [&](int64_t place, int64_t row) {
    const H* const y = row_of<const H>(a.hs, place);
    const H* const g = row_of<const H>(a.grad, row);
    H* const dh = row_of<H>(a.dh, row);
    const double length = norm_of(y, a.d), norm = a.norms[place];
    if (length == 0) {
      a.dnorms[place] = 0;
      for (int64_t j = 0; j < a.d; ++j) narrow(dh + j, 0.0f);
      return;
    }
    const double along = dot(y, g, a.d) / length, share = along / length;
    const double factor = static_cast<float>(length) == a.norms[place] ? 1.0 : norm / length;
    a.dnorms[place] = static_cast<float>(along);
    for (int64_t j = 0; j < a.d; ++j) {
      narrow(dh + j, static_cast<float>(factor * (widen(g[j]) - widen(y[j]) * share)));
    }
  });
}

}  // namespace

#define REFT_BY_DTYPE(FUNCTION)           \
  switch (args.dtype) {                   \
    case Dtype::f32:                      \
      return FUNCTION<float>(args, tile); \
    case Dtype::bf16:                     \
      return FUNCTION<Bf16>(args, tile);  \
    case Dtype::f16:                      \
      return FUNCTION<Half>(args, tile);  \
  }

void row_norms_tile(const KeepNorm& args, const Tile& tile) { REFT_BY_DTYPE(norms) }

void restore_norms_tile(const KeepNorm& args, const Tile& tile) { REFT_BY_DTYPE(restore) }

void restore_norms_backward_tile(const KeepNormBackward& args, const Tile& tile) {
  REFT_BY_DTYPE(backward)
}

#undef REFT_BY_DTYPE

}  // namespace reft
