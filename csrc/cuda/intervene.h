// The CUDA kernels, on raw device pointers: h[row] += Uᵀ φ(D h[row] + c), and its gradients.
//
// Tensors and tables are those of reft_kernels/ops/schema.py, as in ../cpu/intervene.h. Everything
// is on the device, so nothing here looks at the plan's numbers: they were checked when the plan
// was made. Launches go to the current device, return their error and wait for nothing.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
struct CUstream_st;
typedef CUstream_st* cudaStream_t;
#endif

#include <string>

#include "../cpu/intervene.h"

namespace reft::cuda {

// Elements of a row, and from the beginning of one to the next.
constexpr int64_t kMaxWidth = int64_t{1} << 30, kMaxStride = (int64_t{1} << 32) - 1;

// Columns of p and v that the first backward kernel keeps for the second, which computes them again
// for ranges of a higher rank.
constexpr int64_t kKept = 64;

// The norm that follows an edit: weight and shift [d] of h's dtype, shift may be null.
struct NextNorm {
  const void* weight;
  const void* shift;
  void* out;  // [rows of h, d], contiguous
  float eps;
  int32_t kind;  // a sum of `Norm`
};

// How a tile's sums and pool rows come to its blocks. The bits are the same in all ways; which one
// is the fastest is for measurements to say. Those beside the usual one are for pools and h in
// bfloat16, from sm_90 on.
enum class Way : int32_t {
  usual = 0,
  push = 1,  // sums go to the other blocks by st.async (push.cuh); for clusters
  ring =
      2  // pool rows come by bulk copies, ahead of their use (ring.cuh); for several units a block
};

struct ForwardCall : Forward {
  int64_t row_count;  // rows of h; a plan row beyond them is skipped
  int64_t tile_count;
  int64_t pool_rows;
  int64_t positions;  // rows that the plan names
  NextNorm norm;      // for launch_forward_norm
  Way way = Way::usual;
};

struct BackwardCall : Backward {  // p, v: [n, kKept] or null where the pool needs no gradient
  int64_t row_count;
  int64_t tile_count;
  int64_t pool_rows;
  int64_t positions;  // rows that the plan names
  int64_t segments;
  const int32_t* offsets;  // [segments + 1]
  PoolGrad pool_grad;      // [P, d] of the pool's dtype
  float* bias_grad;        // [P]
};

// h += addend and addend = 0 in the rows of tiles that edit something.
struct FoldCall {
  Matrix h, addend;
  int64_t d;
  Dtype dtype;  // of both
  Plan plan;
  int64_t row_count, tile_count;  // as of a ForwardCall
};
constexpr int64_t kFoldColumns = 1024;  // that a block takes

// Null, or what went wrong, by CUDA's own name for it.
const char* launch_fold(const FoldCall& call, cudaStream_t stream);
const char* launch_forward(const ForwardCall& call, cudaStream_t stream);

// The same, and the norm of every row that the plan names, also in tiles that edit nothing.
const char* launch_forward_norm(const ForwardCall& call, cudaStream_t stream);

// The same two in another way than the usual one, which these call where it is asked for. Where
// that way has no kernel for the call, nothing runs, and the text says why.
const char* launch_forward_way(const ForwardCall& call, bool norm, cudaStream_t stream);

// dh of the edited rows, which must hold a copy of grad before, and p and v.
const char* launch_backward_rows(const BackwardCall& call, cudaStream_t stream);

// Gradients of all pool rows, zeros where no row used them.
const char* launch_backward_pool(const BackwardCall& call, cudaStream_t stream);

// What the current device makes of each form of the kernels: JSON objects, with commas between.
std::string describe_forward();
std::string describe_forward_norm();
std::string describe_forward_ways();
std::string describe_backward();

}  // namespace reft::cuda
