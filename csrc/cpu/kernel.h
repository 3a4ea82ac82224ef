// The kernels, written once over `Vec`. Every isa_*.cpp includes this after its vector type; all
// names are local to that file, so that no function compiled for one instruction set is linked into
// another.
//
// Batch invariance: whatever the blocking, a number is summed in one vector accumulator, over d (or
// over the rank) in ascending order. So a row's bits depend neither on its neighbours in a tile nor
// on which block sizes its tile was cut into.
#pragma once

#include "intervene.h"
#include "source.h"

namespace reft {
namespace {

constexpr int64_t kRowBlock = 4;
// Vectors of a row that are in flight in `expand` and `weight_block`.
constexpr int kWide = Vec::kBlock;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What `project` and `expand` step through d by: Vec, unless a vector type of the instruction set's
// own declares itself for the two element types.
template <class X, class W>
Vec unit_of(X, W);

inline Vec dot(const Vec& a, const Vec& b, const Vec& sum) { return fma(a, b, sum); }

template <class V, class T>
inline V get(const T* p) {
  if constexpr (V::kLanes == Vec::kLanes) {
    return load(p);
  } else {
    return load_pair(p);
  }
}
template <class V, class T>
inline V get(const T* p, int64_t n) {
  if constexpr (V::kLanes == Vec::kLanes) {
    return load_part(p, n);
  } else {
    return load_pair(p, n);
  }
}

// z[r][m] = w_r · x_m for M rows and R pool rows; z is [.., kTile]. The sum is taken in chunks of d
// that are then added up: in one long sum, each term would be rounded at the magnitude of the
// whole.
template <int M, int R, class X, class W>
void dot_block(const X* const* x, const W* const* w, int64_t d, float* const* z) {
  using V = decltype(unit_of(X{}, W{}));
  constexpr int64_t kChunk = 1024;
  Vec totals[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) totals[r][m] = zero();
  for (int64_t begin = 0; begin < d; begin += kChunk) {
    const int64_t end = least(begin + kChunk, d);
    Vec sums[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = zero();
    const auto step = [&](auto read) {
      V xs[M];
      for (int m = 0; m < M; ++m) xs[m] = read(x[m]);
      for (int r = 0; r < R; ++r) {
        const V ws = read(w[r]);
        for (int m = 0; m < M; ++m) sums[r][m] = dot(ws, xs[m], sums[r][m]);
      }
    };
    int64_t j = begin;
    for (; j + V::kLanes <= end; j += V::kLanes) {
      step([j](const auto* row) { return get<V>(row + j); });
    }
    if (j < end) {
      step([j, end](const auto* row) { return get<V>(row + j, end - j); });
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) totals[r][m] = add(totals[r][m], sums[r][m]);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) z[r][m] = sum(totals[r][m]);
}

template <int M, class X, class W>
void dot_rows(const X* const* x, const W* const* w, int count, int64_t d, float* const* z) {
  int r = 0;
  for (; r + Vec::kBlock <= count; r += Vec::kBlock) dot_block<M, Vec::kBlock>(x, w + r, d, z + r);
  for (; r < count; ++r) dot_block<M, 1>(x, w + r, d, z + r);
}

// z[r][m] = w_r · x_m. Rows of w that have no product (see `kind`, which may be null) are not read
// and get 0.
template <class X, class W>
void project(const X* const* x, int64_t count, const W* w, const int32_t* kind, int64_t rank,
             int64_t d, float* z) {
  constexpr int kGroup = 8;
  const W* group[kGroup];
  float* out[kGroup];
  for (int64_t r = 0; r < rank;) {
    int size = 0;
    for (; r < rank && size < kGroup; ++r) {
      if (kind != nullptr && (kind[r] & kNoProduct)) {
        for (int64_t m = 0; m < count; ++m) z[r * kTile + m] = 0.0f;
        continue;
      }
      group[size] = w + r * d;
      out[size++] = z + r * kTile;
    }
    int64_t m = 0;
    for (; m + kRowBlock <= count; m += kRowBlock) {
      dot_rows<kRowBlock>(x + m, group, size, d, out);
      for (int i = 0; i < size; ++i) out[i] += kRowBlock;
    }
    for (; m < count; ++m) {
      dot_rows<1>(x + m, group, size, d, out);
      for (int i = 0; i < size; ++i) ++out[i];
    }
  }
}

// to_m[j] = from_m[j] + Σ_r v[r][m] w_r[j] for M rows, and for N units of j or, if N is 0, the last
// `part` elements. The sum comes first, so that it is rounded at its own magnitude and not at h's.
template <int M, int N, class H, class W>
void expand_block(const H* const* from, H* const* to, const W* w, const int32_t* kind, int64_t rank,
                  int64_t d, const float* v, int64_t j, int64_t part) {
  using V = decltype(unit_of(H{}, W{}));
  constexpr int kUnits = N ? N : 1;
  typename V::Sum sums[M][kUnits];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < kUnits; ++i) sums[m][i] = typename V::Sum{};
  for (int64_t r = 0; r < rank; ++r) {
    if (kind != nullptr && (kind[r] & kNoProduct)) continue;
    const W* row = w + r * d + j;
    V ws[kUnits];
    for (int i = 0; i < kUnits; ++i) ws[i] = N ? get<V>(row + i * V::kLanes) : get<V>(row, part);
    for (int m = 0; m < M; ++m) {
      const Vec vs = broadcast(v[r * kTile + m]);
      for (int i = 0; i < kUnits; ++i) sums[m][i] = fma(vs, ws[i], sums[m][i]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < kUnits; ++i) {
      const int64_t at = j + i * V::kLanes;
      if (N) {
        store(to[m] + at, add(get<V>(from[m] + at), sums[m][i]));
      } else {
        store_part(to[m] + at, add(get<V>(from[m] + at, part), sums[m][i]), part);
      }
    }
  }
}

template <int M, class H, class W>
void expand_rows(const H* const* from, H* const* to, const W* w, const int32_t* kind, int64_t rank,
                 int64_t d, const float* v) {
  using V = decltype(unit_of(H{}, W{}));
  constexpr int kUnits = kWide * Vec::kLanes / V::kLanes;
  int64_t j = 0;
  for (; j + kUnits * V::kLanes <= d; j += kUnits * V::kLanes)
    expand_block<M, kUnits>(from, to, w, kind, rank, d, v, j, 0);
  for (; j + V::kLanes <= d; j += V::kLanes)
    expand_block<M, 1>(from, to, w, kind, rank, d, v, j, 0);
  if (j < d) expand_block<M, 0>(from, to, w, kind, rank, d, v, j, d - j);
}

// to_m = from_m + Σ_r v[r][m] w_r, without the rows of w that have no product if `kind` is given. A
// few rows at a time: where d is a power of two all rows fall on the same few sets of the first
// cache.
template <class H, class W>
void expand(const H* const* from, H* const* to, int64_t count, const W* w, const int32_t* kind,
            int64_t rank, int64_t d, const float* v) {
  int64_t m = 0;
  for (; m + kRowBlock <= count; m += kRowBlock)
    expand_rows<kRowBlock>(from + m, to + m, w, kind, rank, d, v + m);
  for (; m < count; ++m) expand_rows<1>(from + m, to + m, w, kind, rank, d, v + m);
}

// Fills the rows to_m that a NaN among v[r][m] makes NaN throughout with one and the same NaN,
// moves the others to the front of v, from and to, and returns how many these are. Left to the
// sums, sign and payload of a NaN would follow the order of operands, which compilers choose anew
// for each block size.
template <class From, class H>
int64_t fill_undefined(From** from, H** to, int64_t count, const int32_t* kind, int64_t rank,
                       int64_t d, float* v) {
  int64_t kept = 0;
  for (int64_t m = 0; m < count; ++m) {
    bool undefined = false;
    for (int64_t r = 0; r < rank; ++r) {
      if (kind != nullptr && (kind[r] & kNoProduct)) continue;
      undefined |= v[r * kTile + m] != v[r * kTile + m];
    }
    if (undefined) {
      const Vec nan = broadcast(__builtin_nanf(""));
      int64_t j = 0;
      for (; j + Vec::kLanes <= d; j += Vec::kLanes) store(to[m] + j, nan);
      if (j < d) store_part(to[m] + j, nan, d - j);
      continue;
    }
    from[kept] = from[m];
    to[kept] = to[m];
    for (int64_t r = 0; r < rank && kept != m; ++r) v[r * kTile + kept] = v[r * kTile + m];
    ++kept;
  }
  return kept;
}

template <class H, class P>
void forward_typed(const Forward& a, const Tile& tile, float* z) {
  const Span span = a.plan.spans[tile.segment];
  const int64_t skip = span.first * a.d;
  const float* bias = a.pool.bias + span.first;
  const int32_t* kind = a.pool.kind + span.first;
  H* rows[kTile];
  int64_t count = 0;
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = a.plan.rows[tile.start + i];
    if (row >= 0) rows[count++] = static_cast<H*>(a.h.data) + row * a.h.stride;
  }
  if (count == 0) return;
  project(rows, count, static_cast<const P*>(a.pool.down) + skip, kind, span.rank, a.d, z);
  if (a.source.data != nullptr) add_source(a.source, a.plan, tile, span.rank, z);
  for (int64_t r = 0; r < span.rank; ++r)
    for (int64_t m = 0; m < count; ++m)
      z[r * kTile + m] = activate(z[r * kTile + m] + bias[r], kind[r]);
  const P* up = static_cast<const P*>(a.pool.up) + skip;
  const int32_t* const every = nullptr;
  count = fill_undefined(rows, rows, count, every, span.rank, a.d, z);
  expand(rows, rows, count, up, every, span.rank, a.d, z);
}

template <class H, class P>
void backward_typed(const Backward& a, const Tile& tile, float* z) {
  const Span span = a.plan.spans[tile.segment];
  const int64_t skip = span.first * a.d;
  const P* down = static_cast<const P*>(a.pool.down) + skip;
  const P* up = static_cast<const P*>(a.pool.up) + skip;
  const float* bias = a.pool.bias + span.first;
  const int32_t* kind = a.pool.kind + span.first;
  const H* g[kTile];
  const H* x[kTile];
  H* dh[kTile];
  int64_t place[kTile];
  int64_t count = 0;
  for (int64_t i = tile.start; i < tile.start + tile.count; ++i) {
    const int64_t row = a.plan.rows[i];
    if (row < 0) continue;
    g[count] = static_cast<const H*>(a.grad.data) + row * a.grad.stride;
    x[count] = static_cast<const H*>(a.hs.data) + i * a.hs.stride;
    dh[count] = static_cast<H*>(a.dh.data) + row * a.dh.stride;
    place[count++] = i * a.rank_stride;
  }
  if (count == 0) return;
  float* p = z + span.rank * kTile;
  project(x, count, down, kind, span.rank, a.d, z);
  project(g, count, up, static_cast<const int32_t*>(nullptr), span.rank, a.d, p);
  if (a.source.data != nullptr) add_source(a.source, a.plan, tile, span.rank, z);
  for (int64_t r = 0; r < span.rank; ++r) {
    for (int64_t m = 0; m < count; ++m) {
      const float before = z[r * kTile + m] + bias[r];
      float& slope = p[r * kTile + m];
      slope *= activation_slope(before, kind[r]);
      a.p[place[m] + r] = slope;
      a.v[place[m] + r] = activate(before, kind[r]);
    }
  }
  if (a.dh.data == nullptr) return;
  count = fill_undefined(g, dh, count, kind, span.rank, a.d, p);
  expand(g, dh, count, down, kind, span.rank, a.d, p);
}

// Adds Σ_m coefficient_m[r] x_m[j] over `count` rows to sums[r][j], for R rows and V vectors of j
// (or, if V is 0, the last `part` elements). sums is [.., kSlice], and need not hold what lies
// beyond `part`.
template <int R, int V, class H>
void weight_block(const H* const* x, const float* const* coefficient, int64_t count, float* sums,
                  int64_t j, int64_t part) {
  constexpr int kVectors = V ? V : 1;
  Vec acc[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kVectors; ++i) acc[r][i] = zero();
  for (int64_t m = 0; m < count; ++m) {
    Vec xs[kVectors];
    for (int i = 0; i < kVectors; ++i)
      xs[i] = V ? load(x[m] + j + i * Vec::kLanes) : load_part(x[m] + j, part);
    for (int r = 0; r < R; ++r) {
      const Vec c = broadcast(coefficient[m][r]);
      for (int i = 0; i < kVectors; ++i) acc[r][i] = fma(c, xs[i], acc[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      float* at = sums + r * kSlice + i * Vec::kLanes;
      store(at, add(load(at), acc[r][i]));
    }
  }
}

template <int R, class H>
void weight_columns(const H* const* x, const float* const* coefficient, int64_t count, float* sums,
                    int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + kWide * Vec::kLanes <= end; j += kWide * Vec::kLanes)
    weight_block<R, kWide>(x, coefficient, count, sums + (j - begin), j, 0);
  for (; j + Vec::kLanes <= end; j += Vec::kLanes)
    weight_block<R, 1>(x, coefficient, count, sums + (j - begin), j, 0);
  if (j < end) weight_block<R, 0>(x, coefficient, count, sums + (j - begin), j, end - j);
}

// Σ over the rows of a range's terms, in the plan's order. `row_of` maps a plan position to its
// row.
template <class H, class P, class RowOf>
void weight_sum(const Backward& a, const Range& range, const float* coefficient, RowOf row_of,
                const int32_t* kind, P* out, int64_t begin, int64_t end, float* sums) {
  // So many rows are summed in registers before they meet the sums in memory: a slice of each stays
  // in the cache for all ranks, and a long sum in two stages loses less.
  constexpr int64_t kRows = 64;
  for (int64_t i = 0; i < range.rank * kSlice; ++i) sums[i] = 0.0f;
  for (int64_t t = 0; t < range.term_count; ++t) {
    const Term term = range.terms[t];
    for (int64_t at = term.start; at < term.stop;) {
      const H* x[kRows];
      const float* c[kRows];
      int64_t count = 0;
      for (; at < term.stop && count < kRows; ++at) {
        if (a.plan.rows[at] < 0) continue;
        x[count] = row_of(at);
        c[count++] = coefficient + at * a.rank_stride + term.column;
      }
      const auto next = [&](int64_t ranks) {
        for (int64_t m = 0; m < count; ++m) c[m] += ranks;
      };
      int64_t r = 0;
      for (; r + Vec::kBlock <= range.rank; r += Vec::kBlock, next(Vec::kBlock))
        weight_columns<Vec::kBlock>(x, c, count, sums + r * kSlice, begin, end);
      for (; r < range.rank; ++r, next(1))
        weight_columns<1>(x, c, count, sums + r * kSlice, begin, end);
    }
  }
  for (int64_t r = 0; r < range.rank; ++r) {
    if (kind != nullptr && (kind[range.first + r] & kNoProduct)) continue;  // it stays zero
    P* row = out + (range.first + r) * a.d;
    const float* from = sums + r * kSlice;
    int64_t j = begin;
    for (; j + Vec::kLanes <= end; j += Vec::kLanes) store(row + j, load(from + (j - begin)));
    if (j < end) store_part(row + j, load_part(from + (j - begin), end - j), end - j);
  }
}

template <class H, class P>
void weight_typed(const Backward& a, const PoolGrad& out, const Range& range, int64_t begin,
                  int64_t end, float* sums) {
  const auto hidden = [&](int64_t at) {
    return static_cast<const H*>(a.hs.data) + at * a.hs.stride;
  };
  const auto gradient = [&](int64_t at) {
    return static_cast<const H*>(a.grad.data) + a.plan.rows[at] * a.grad.stride;
  };
  weight_sum<H>(a, range, a.p, hidden, a.pool.kind, static_cast<P*>(out.down), begin, end, sums);
  weight_sum<H>(a, range, a.v, gradient, static_cast<const int32_t*>(nullptr),
                static_cast<P*>(out.up), begin, end, sums);
}

// The pool's dtype is h's, or float32.
#define REFT_BY_DTYPE(FUNCTION, H, POOL, ...)                        \
  switch (H) {                                                       \
    case Dtype::f32:                                                 \
      return FUNCTION<float, float>(__VA_ARGS__);                    \
    case Dtype::bf16:                                                \
      return POOL == Dtype::f32 ? FUNCTION<Bf16, float>(__VA_ARGS__) \
                                : FUNCTION<Bf16, Bf16>(__VA_ARGS__); \
    case Dtype::f16:                                                 \
      return POOL == Dtype::f32 ? FUNCTION<Half, float>(__VA_ARGS__) \
                                : FUNCTION<Half, Half>(__VA_ARGS__); \
  }

void forward_tile(const Forward& a, const Tile& tile, float* scratch) {
  REFT_BY_DTYPE(forward_typed, a.dtype, a.pool.dtype, a, tile, scratch)
}

void backward_tile(const Backward& a, const Tile& tile, float* scratch) {
  REFT_BY_DTYPE(backward_typed, a.dtype, a.pool.dtype, a, tile, scratch)
}

void weight_grad(const Backward& a, const PoolGrad& out, const Range& range, int64_t begin,
                 int64_t end, float* scratch) {
  REFT_BY_DTYPE(weight_typed, a.dtype, a.pool.dtype, a, out, range, begin, end, scratch)
}

#undef REFT_BY_DTYPE

}  // namespace
}  // namespace reft
