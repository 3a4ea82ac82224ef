// The CPU kernels, on raw pointers: h[row] += Uᵀ φ(D h[row] + c), its gradients, and the norm of
// rows.
//
// Every instruction set has a translation unit of its own, compiled with its own flags, that fills
// one `Isa` table; `select_isa` chooses at run time. The arguments are checked by the caller.
#pragma once

#include <cstdint>

namespace reft {

enum class Dtype { f32, bf16, f16 };

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The constants of reft_kernels/ops/schema.py.
constexpr int64_t kTile = 16;
constexpr int32_t kNoProduct = 0x100;
constexpr int32_t kActMask = 0xFF;
enum Act : int32_t {
  kNone,
  kRelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kSigmoid,
  kTanh,
  kQuickGelu,
  kLeakyRelu,
  kStep
};
enum Norm : int64_t { kCentred = 1, kPlusOne = 2, kRound = 4 };

// down, up: [P, d] of `dtype`; bias, kind: [P].
struct Pool {
  const void* down;
  const void* up;
  const float* bias;
  const int32_t* kind;
  Dtype dtype;
};

struct Tile {
  int32_t segment, start, count;
};
struct Span {
  int32_t first, rank;
};
struct Plan {
  const int32_t* rows;
  const Tile* tiles;
  const Span* spans;
};

// The pool range of a tile; rank 0 where it has nothing to do: no rows, or no segment (−1).
inline Span span_of(const Plan& plan, const Tile& tile) {
  return tile.count > 0 && tile.segment >= 0 ? plan.spans[tile.segment] : Span{0, 0};
}

// Rows of d elements, `stride` elements apart.
struct Matrix {
  void* data;
  int64_t stride;
};

// What is added to c in each row: [n, stride], in the plan's order, one column for each pool row of
// the row's span. data is null where there is none.
struct Source {
  const float* data;
  int64_t stride;
};

struct Forward {
  Matrix h;
  int64_t d;
  Dtype dtype;  // of h
  Pool pool;
  Plan plan;
  Source source;
};

// out[row] = the norm of h[row]; see Norm in reft_kernels/ops/schema.py.
struct RowNorm {
  Matrix h;
  Matrix out;
  int64_t d;
  Dtype dtype;         // of h, out, weight and shift
  const void* weight;  // [d]
  const void* shift;   // [d] or null
  double eps;
  int64_t norm;  // a sum of Norm
};

// p = φ′(z) ⊙ (U g) and v = φ(z) of the plan's rows: p, v [n, rank_stride].
struct Backward {
  Matrix grad;  // like h
  Matrix hs;    // [n, d], the plan's rows of h
  Matrix dh;    // like grad; data is null where it is not needed
  int64_t d;
  Dtype dtype;  // of grad, hs and dh
  Pool pool;
  Plan plan;
  float* p;
  float* v;
  int64_t rank_stride;
  Source source;
};

// The rows of one segment as one term of a weight gradient: plan positions [start, stop), and the
// column of p and v that belongs to the range's first pool row.
struct Term {
  int32_t start, stop, column;
};

// Pool rows [first, first + rank) whose gradients are the same sum of terms.
struct Range {
  int64_t first, rank;
  const Term* terms;
  int64_t term_count;
};

// Gradients of the pool, [P, d] of the pool's dtype.
struct PoolGrad {
  void* down;
  void* up;
};

// Columns of d in one task of `weight_grad`.
constexpr int64_t kSlice = 256;

struct Isa {
  const char* name;
  // The tiles take floats of scratch: forward_scratch(rank) and backward_scratch(rank) of them.
  void (*forward_tile)(const Forward&, const Tile&, float* scratch);
  // h += addend and addend = 0 in a tile's rows; addend is like h.
  void (*fold_tile)(const Forward&, const Matrix& addend, const Tile&);
  void (*backward_tile)(const Backward&, const Tile&, float* scratch);
  void (*norm_row)(const RowNorm&, int64_t row);
  // dD = Σ p hᵀ and dU = Σ v gᵀ of a range, columns [begin, end), at most kSlice of them. Scratch:
  // weight_scratch(rank).
  void (*weight_grad)(const Backward&, const PoolGrad&, const Range&, int64_t begin, int64_t end,
                      float* scratch);
};

constexpr int64_t forward_scratch(int64_t rank) { return rank * kTile; }
constexpr int64_t backward_scratch(int64_t rank) { return 2 * rank * kTile; }
constexpr int64_t weight_scratch(int64_t rank) { return rank * kSlice; }

// φ and φ′ of the code in `kind`. Compiled once, for the baseline instruction set.
float activate(float z, int32_t kind);
float activation_slope(float z, int32_t kind);

struct IsaChoice {
  const Isa* isa;     // null on error
  const char* error;  // null if all is well
};

// The best instruction set of this machine, or the one that REFT_KERNELS_CPU_ISA names. Chosen
// once.
const IsaChoice& select_isa();

#ifdef __x86_64__
extern const Isa kAvx512Bf16;
extern const Isa kAvx512;
extern const Isa kAvx2;
#endif
extern const Isa kScalar;

}  // namespace reft
