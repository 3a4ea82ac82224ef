#include "scale_shift.h"

#include <algorithm>

#include "vec_scalar.h"

namespace reft {
namespace {

// Columns whose sums stay in the cache, and rows that are summed before they meet the sum of all: a
// long sum in two stages loses less.
constexpr int64_t kColumns = 256, kRows = 64;

template <class H>
H* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<H*>(matrix.data) + row * matrix.stride;
}

template <class H>
void forward(const ScaleShift& a, const Tile& tile) {
  const int64_t skip = int64_t{a.plan.spans[tile.segment].first} * a.d;
  const float *m = a.pool.scale_less_one + skip, *v = a.pool.shift + skip;
  for (int64_t i = tile.start; i < int64_t{tile.start} + tile.count; ++i) {
    if (a.plan.rows[i] < 0) continue;
    H* const h = row_of<H>(a.h, a.plan.rows[i]);
    for (int64_t j = 0; j < a.d; ++j) {
      const float scaled = (1.0f + m[j]) * widen(h[j]) + v[j];
      narrow(h + j, m[j] == -1.0f ? v[j] : scaled);
    }
  }
}

template <class H>
void backward(const ScaleShiftBackward& a, const Tile& tile) {
  const float* const m = a.pool.scale_less_one + int64_t{a.plan.spans[tile.segment].first} * a.d;
  for (int64_t i = tile.start; i < int64_t{tile.start} + tile.count; ++i) {
    if (a.plan.rows[i] < 0) continue;
    const H* const g = row_of<const H>(a.grad, a.plan.rows[i]);
    H* const dh = row_of<H>(a.dh, a.plan.rows[i]);
    for (int64_t j = 0; j < a.d; ++j) {
      narrow(dh + j, m[j] == -1.0f ? 0.0f : (1.0f + m[j]) * widen(g[j]));
    }
  }
}

template <class H>
void sums(const ScaleShiftBackward& a, const Range& range, int64_t begin, int64_t end, float* ds,
          float* dv) {
  float s[kColumns], v[kColumns];
  for (int64_t from = begin; from < end; from += kColumns) {
    const int64_t count = std::min(kColumns, end - from);
    std::fill(ds + from, ds + from + count, 0.0f);
    std::fill(dv + from, dv + from + count, 0.0f);
    for (int64_t t = 0; t < range.term_count; ++t) {
      const Term term = range.terms[t];
      for (int64_t at = term.start; at < term.stop;) {
        std::fill(s, s + count, 0.0f);
        std::fill(v, v + count, 0.0f);
        for (int64_t taken = 0; at < term.stop && taken < kRows; ++at) {
          if (a.plan.rows[at] < 0) continue;
          ++taken;
          const H* const g = row_of<const H>(a.grad, a.plan.rows[at]) + from;
          const H* const x = row_of<const H>(a.hs, at) + from;
          for (int64_t j = 0; j < count; ++j) {
            s[j] += widen(g[j]) * widen(x[j]);
            v[j] += widen(g[j]);
          }
        }
        for (int64_t j = 0; j < count; ++j) {
          ds[from + j] += s[j];
          dv[from + j] += v[j];
        }
      }
    }
  }
}

}  // namespace

#define REFT_BY_DTYPE(FUNCTION, ...)       \
  switch (args.dtype) {                    \
    case Dtype::f32:                       \
      return FUNCTION<float>(__VA_ARGS__); \
    case Dtype::bf16:                      \
      return FUNCTION<Bf16>(__VA_ARGS__);  \
    case Dtype::f16:                       \
      return FUNCTION<Half>(__VA_ARGS__);  \
  }

void scale_shift_tile(const ScaleShift& args, const Tile& tile) {
  REFT_BY_DTYPE(forward, args, tile)
}

void scale_shift_backward_tile(const ScaleShiftBackward& args, const Tile& tile) {
  REFT_BY_DTYPE(backward, args, tile)
}

void scale_shift_sums(const ScaleShiftBackward& args, const Range& range, int64_t begin,
                      int64_t end, float* ds, float* dv) {
  REFT_BY_DTYPE(sums, args, range, begin, end, ds, dv)
}

#undef REFT_BY_DTYPE

}  // namespace reft
