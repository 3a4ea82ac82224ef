// The elementwise kernels. A block takes a tile's rows and some columns: the pool's row is read
// once for all of them. Nothing is summed along a row, so a row's bits can't depend on others. The
// pool's gradients are summed by one block for each pool row and 64 columns: a warp takes every
// eighth row of a segment, and the warps are added in order.
#include "scale_shift.h"
#include "sums.cuh"

namespace reft::cuda {
namespace {

constexpr int kThreads = 256, kEach = static_cast<int>(kScaleColumns) / kThreads;
constexpr int kSumWarps = 8, kSumFloats = 2 * static_cast<int>(kScaleSumColumns);

// What the forward and dh share: `from` and `to` may be the same rows.
struct RowWork {
  Matrix from, to;
  int64_t d, row_count;
  ScalePool pool;
  Plan plan;
};

template <class H, bool kShifted>
__global__ void __launch_bounds__(kThreads) scale_rows(RowWork work, int64_t chunks) {
  const Tile tile = work.plan.tiles[blockIdx.x / chunks];
  if (tile.count <= 0 || tile.segment < 0) return;
  const Span span = work.plan.spans[tile.segment];
  if (span.rank <= 0) return;
  const int64_t begin = blockIdx.x % chunks * kScaleColumns + threadIdx.x;
  const int64_t skip = int64_t{span.first} * work.d;
  float m[kEach], v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t col = begin + i * kThreads;
    m[i] = col < work.d ? work.pool.scale_less_one[skip + col] : 0.0f;
    v[i] = kShifted && col < work.d ? work.pool.shift[skip + col] : 0.0f;
  }
  for (int at = 0; at < tile.count; ++at) {
    const int64_t row = work.plan.rows[tile.start + at];
    if (row < 0 || row >= work.row_count) continue;
    const H* const from = static_cast<const H*>(work.from.data) + row * work.from.stride;
    H* const to = static_cast<H*>(work.to.data) + row * work.to.stride;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t col = begin + i * kThreads;
      if (col >= work.d) continue;
      if (m[i] == -1.0f) {  // s = 0 assigns: h is not multiplied, for it may be Inf or NaN
        round_to(v[i], to + col);
      } else {
        const float scale = 1.0f + m[i], x = to_float(from[col]);
        round_to(kShifted ? fmaf(scale, x, v[i]) : scale * x, to + col);
      }
    }
  }
}

template <class H>
__global__ void __launch_bounds__(kSumWarps * 32)
    scale_sums(ScaleShiftBackwardCall call, int64_t chunks) {
  const int64_t pool_row = blockIdx.x / chunks, begin = blockIdx.x % chunks * kScaleSumColumns;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float ds[2] = {}, dv[2] = {};
  const auto owns = [pool_row](Span span) { return span.rank > 0 && span.first == pool_row; };
  const Segments owners(call.plan, call.segments, owns);
  for (int s = owners.begin; s < owners.end; ++s) {
    if (!owns(call.plan.spans[s])) continue;
    const int end = call.offsets[s + 1];
    for (int at = call.offsets[s] + warp; at < end; at += kSumWarps) {
      const int64_t row = call.plan.rows[at];
      if (row < 0 || row >= call.row_count) continue;
      const H* const g = static_cast<const H*>(call.grad.data) + row * call.grad.stride;
      const H* const x = static_cast<const H*>(call.hs.data) + at * call.hs.stride;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t col = begin + lane + 32 * i;
        if (col >= call.d) continue;
        const float gradient = to_float(g[col]);
        ds[i] = fmaf(gradient, to_float(x[col]), ds[i]);
        dv[i] += gradient;
      }
    }
  }
  float* const sums = shared_memory();  // [warps, 2, 64]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[warp * kSumFloats + lane + 32 * i] = ds[i];
    sums[warp * kSumFloats + kScaleSumColumns + lane + 32 * i] = dv[i];
  }
  sync_block();
  const int mine = static_cast<int>(threadIdx.x);
  if (mine >= kSumFloats) return;
  float total = 0.0f;
  for (int i = 0; i < kSumWarps; ++i) total += sums[i * kSumFloats + mine];
  const int64_t col = begin + mine % kScaleSumColumns;
  float* const out = mine < kScaleSumColumns ? call.scale_grad : call.shift_grad;
  if (col < call.d) out[pool_row * call.d + col] = total;
}

template <bool kShifted>
const char* run_rows(const RowWork& work, Dtype dtype, int64_t tiles, cudaStream_t stream) {
  if (tiles == 0 || work.row_count == 0) return nullptr;
  const int64_t chunks = (work.d + kScaleColumns - 1) / kScaleColumns;
  const Launch how{tiles * chunks, 1, kThreads, 1, 0, stream};
  switch (dtype) {
    case Dtype::f32:
      return launch(scale_rows<float, kShifted>, how, work, chunks);
    case Dtype::bf16:
      return launch(scale_rows<Bf16, kShifted>, how, work, chunks);
    default:
      return launch(scale_rows<Half, kShifted>, how, work, chunks);
  }
}

}  // namespace

const char* launch_scale_shift(const ScaleShiftCall& call, cudaStream_t stream) {
  const RowWork work{call.h, call.h, call.d, call.row_count, call.pool, call.plan};
  return run_rows<true>(work, call.dtype, call.tile_count, stream);
}

const char* launch_scale_shift_rows(const ScaleShiftBackwardCall& call, cudaStream_t stream) {
  const RowWork work{call.grad, call.dh, call.d, call.row_count, call.pool, call.plan};
  return run_rows<false>(work, call.dtype, call.tile_count, stream);
}

const char* launch_scale_shift_sums(const ScaleShiftBackwardCall& call, cudaStream_t stream) {
  if (call.pool_rows == 0) return nullptr;
  const int64_t chunks = (call.d + kScaleSumColumns - 1) / kScaleSumColumns;
  const int64_t shared = int64_t{sizeof(float)} * kSumWarps * kSumFloats;
  const Launch how{call.pool_rows * chunks, 1, kSumWarps * 32, 1, shared, stream};
  switch (call.dtype) {
    case Dtype::f32:
      return launch(scale_sums<float>, how, call, chunks);
    case Dtype::bf16:
      return launch(scale_sums<Bf16>, how, call, chunks);
    default:
      return launch(scale_sums<Half>, how, call, chunks);
  }
}

}  // namespace reft::cuda
