// The backward kernels, from g = grad and the saved rows x = hs (h before the edit):
//
//     z = D x + c    w = U g    v = φ(z)    p = φ′(z) ⊙ w
//     dh = g + Dᵀ p    dD = Σ p xᵀ    dU = Σ v gᵀ    dc = Σ p        (sums over the rows of a
//     segment)
//
// `backward_rows` writes dh of a tile's rows and keeps p and v. `backward_pool` walks, for 8 pool
// rows and 64 columns, the segments that own some of them, in order: segments may share pool rows,
// and each sum has one place, so there are no atomics. All sums are float32 in a fixed order.
#include "activation.cuh"
#include "sizes.cuh"

namespace reft::cuda {
namespace {

constexpr int kRowWarps = kUnit / (32 * 8);
constexpr int kRowBlocks = 4;                  // a multiprocessor
constexpr int kPairs = 2;                      // rows at a time
constexpr int kRowSums = kPairs * 2 * kChunk;  // z and w
using RowSums = Sums<kRowWarps, kRowSums>;

// The rows at plan positions [at, at + count), count ≤ kPairs.
template <class H, class P, bool kAligned>
__device__ void differentiate(const BackwardCall& call, const RowSums& sums, int64_t at, int count,
                              Span span, int& turn) {
  const P* down = static_cast<const P*>(call.pool.down) + span.first * call.d;
  const P* up = static_cast<const P*>(call.pool.up) + span.first * call.d;
  const int width = padded(span.rank);
  const int thread = threadIdx.x;
  float* const values = sums.values();  // [kPairs, width]: p, 0 where there is no D

  const H *x_row[kPairs], *g_row[kPairs];
  H* out_row[kPairs];
  bool live[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t row = i < count ? call.plan.rows[at + i] : -1;
    live[i] = row >= 0 && row < call.row_count;
    x_row[i] = static_cast<const H*>(call.hs.data) + (live[i] ? (at + i) * call.hs.stride : 0);
    g_row[i] = static_cast<const H*>(call.grad.data) + (live[i] ? row * call.grad.stride : 0);
    out_row[i] = static_cast<H*>(call.dh.data) + (live[i] ? row * call.dh.stride : 0);
  }

  for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
    const Bend bend(call.pool, span, begin + thread % kChunk);
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      const int64_t col = int64_t{unit} * kUnit + thread * 8, left = call.d - col;
      float totals[kRowSums];
#pragma unroll
      for (int side = 0; side < 2; ++side) {  // z, then w
        float wide[kPairs][8];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          Eight<H> row;
          row.template load<kAligned>((side ? g_row[i] : x_row[i]) + col, left, live[i]);
#pragma unroll
          for (int c = 0; c < 8; ++c) wide[i][c] = row[c];
        }
#pragma unroll
        for (int r = 0; r < kChunk; ++r) {
          Eight<P> pool;
          pool.template load<kAligned>((side ? up : down) + (begin + r) * call.d + col, left,
                                       begin + r < span.rank);
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            totals[(i * 2 + side) * kChunk + r] = dot(pool, wide[i], 0.0f);
          }
        }
      }
      sums.warp(thread / 32)[thread % 32] = warp_total(totals);
      sums.close_unit(unit, turn);
    }
    sync_cluster(sums.blocks);
    if (thread < kPairs * kChunk) {
      const int i = thread / kChunk, r = begin + thread % kChunk;
      const int at_z = i * 2 * kChunk + thread % kChunk;
      const float z = sums.total(at_z, turn);
      const float p = bend.slope(z) * sums.total(at_z + kChunk, turn);
      values[i * width + r] = bend.has_down ? p : 0.0f;
      if (bend.live && call.p != nullptr && span.rank <= kKept && i < count && sums.block == 0) {
        call.p[(at + i) * kKept + r] = p;
        call.v[(at + i) * kKept + r] = bend(z);
      }
    }
  }
  sync_block();
  if (call.dh.data == nullptr) return;

  for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
    const int64_t col = int64_t{unit} * kUnit + thread * 8, left = call.d - col;
    float delta[kPairs][8] = {};
#pragma unroll 4
    for (int r = 0; r < span.rank; ++r) {
      if (call.pool.kind[span.first + r] & kNoProduct) continue;  // its D may hold anything
      Eight<P> pool;
      pool.template load<kAligned>(down + r * call.d + col, left, true);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c) delta[i][c] = fmaf(values[i * width + r], pool[c], delta[i][c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      Eight<H> out;
      out.template load<kAligned>(g_row[i] + col, left, live[i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) round_to(out[c] + delta[i][c], &out.values[c]);
      if (live[i]) out.template store<kAligned>(out_row[i] + col, left);
    }
  }
}

template <class H, class P, bool kAligned>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks)
    backward_rows(const BackwardCall call, int shift, int room) {
  const Tile tile = call.plan.tiles[blockIdx.x >> shift];
  if (tile.count <= 0) return;
  const Span span = range_of(call.plan, tile);
  if (span.rank <= 0) return;
  const int fit = room / padded(span.rank);
  if (fit == 0) stop_kernel();
  const RowSums sums(call.d, shift);
  int turn = 0;
  for (int done = 0; done < tile.count; done += kPairs) {
    differentiate<H, P, kAligned>(call, sums, int64_t{tile.start} + done, tile.count - done, span,
                                  turn);
  }
  leave_cluster(1 << shift);  // another block may still read this one's sums
}

constexpr int kPoolWarps = 8;     // each takes every eighth row of a segment
constexpr int kPoolColumns = 64;  // two for each lane
constexpr int kRowsAhead = 4;     // rows that a warp reads at once

// p and v of pool rows first + begin to first + end, for a row with x and g, computed by one warp.
// Those of the eight that are not in between are not read: they belong to others.
template <class H, class P>
__device__ void again(const BackwardCall& call, const H* x, const H* g, int64_t first, int begin,
                      int end, float (&p)[kChunk], float (&v)[kChunk]) {
  float z[kChunk] = {}, w[kChunk] = {};
  for (int64_t col = threadIdx.x % 32; col < call.d; col += 32) {
    const float xc = to_float(x[col]), gc = to_float(g[col]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j >= begin && j < end) {
        const int64_t place = (first + j) * call.d + col;
        z[j] = fmaf(xc, to_float(static_cast<const P*>(call.pool.down)[place]), z[j]);
        w[j] = fmaf(gc, to_float(static_cast<const P*>(call.pool.up)[place]), w[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if (j < begin || j >= end) continue;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      z[j] += shuffle_xor(z[j], offset);
      w[j] += shuffle_xor(w[j], offset);
    }
    const Bend bend(call.pool, Span{static_cast<int32_t>(first), end}, j);
    v[j] = bend(z[j]);
    p[j] = bend.slope(z[j]) * w[j];
  }
}

// Adds the warps' sums in order and writes them, `columns` of them side by side.
template <class P>
__device__ void write_sums(const float (&sums)[kChunk][2], float* memory, P* out, int64_t first,
                           int64_t pool_rows, int64_t d, int64_t begin) {
  sync_block();
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    const int lane = threadIdx.x % 32, place = (threadIdx.x / 32 * kChunk + j) * kPoolColumns;
    memory[place + 2 * lane] = sums[j][0];
    memory[place + 2 * lane + 1] = sums[j][1];
  }
  sync_block();
  for (int i = threadIdx.x; i < kChunk * kPoolColumns; i += kPoolWarps * 32) {
    const int64_t row = first + i / kPoolColumns, col = begin + i % kPoolColumns;
    if (row >= pool_rows || col >= d) continue;
    float sum = memory[i];
    for (int w = 1; w < kPoolWarps; ++w) sum += memory[w * kChunk * kPoolColumns + i];
    round_to(sum, &out[row * d + col]);
  }
}

template <class H, class P>
__global__ void __launch_bounds__(kPoolWarps * 32, 1) backward_pool(const BackwardCall call) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * kChunk;
  const int64_t begin = int64_t{blockIdx.y} * kPoolColumns, col = begin + 2 * lane;
  float down_sums[kChunk][2] = {}, up_sums[kChunk][2] = {}, bias_sums[kChunk] = {};

  for (int64_t s = 0; s < call.segments; ++s) {
    const Span span = call.plan.spans[s];
    const int64_t from = span.first > first ? span.first : first;
    const int64_t end = int64_t{span.first} + span.rank;
    const int64_t to = end < first + kChunk ? end : first + kChunk;
    if (span.rank <= 0 || from >= to) continue;
    const int skip = static_cast<int>(from - first), count = static_cast<int>(to - from);
    const int column = static_cast<int>(first - span.first);  // of pool row `first` in p and v
    for (int64_t at = call.offsets[s] + warp; at < call.offsets[s + 1];
         at += kPoolWarps * kRowsAhead) {
      float x[kRowsAhead][2], g[kRowsAhead][2];
      bool live[kRowsAhead];
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        const int64_t position = at + i * kPoolWarps;
        const int64_t row = position < call.offsets[s + 1] ? call.plan.rows[position] : -1;
        live[i] = row >= 0 && row < call.row_count;
        const H* xs = static_cast<const H*>(call.hs.data) + position * call.hs.stride;
        const H* gs = static_cast<const H*>(call.grad.data) + row * call.grad.stride;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[i][c] = live[i] && col + c < call.d ? to_float(xs[col + c]) : 0.0f;
          g[i][c] = live[i] && col + c < call.d ? to_float(gs[col + c]) : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        if (!live[i]) continue;
        const int64_t position = at + i * kPoolWarps;
        float p[kChunk], v[kChunk];
        if (span.rank <= kKept) {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) {
            const bool mine = j >= skip && j < skip + count;
            p[j] = mine ? call.p[position * kKept + column + j] : 0.0f;
            v[j] = mine ? call.v[position * kKept + column + j] : 0.0f;
          }
        } else {
          const H* xs = static_cast<const H*>(call.hs.data) + position * call.hs.stride;
          const H* gs =
              static_cast<const H*>(call.grad.data) + call.plan.rows[position] * call.grad.stride;
          again<H, P>(call, xs, gs, first, skip, skip + count, p, v);
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (j < skip || j >= skip + count) continue;  // 0 · Inf of a row that is not its own
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            down_sums[j][c] = fmaf(p[j], x[i][c], down_sums[j][c]);
            up_sums[j][c] = fmaf(v[j], g[i][c], up_sums[j][c]);
          }
          bias_sums[j] += p[j];
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if (first + j < call.pool_rows && (call.pool.kind[first + j] & kNoProduct)) {
      down_sums[j][0] = down_sums[j][1] = 0.0f;
    }
  }
  float* const memory = shared_memory();
  write_sums(down_sums, memory, static_cast<P*>(call.pool_grad.down), first, call.pool_rows, call.d,
             begin);
  write_sums(up_sums, memory, static_cast<P*>(call.pool_grad.up), first, call.pool_rows, call.d,
             begin);
  if (blockIdx.y != 0) return;
  sync_block();
  if (lane == 0) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) memory[warp * kChunk + j] = bias_sums[j];
  }
  sync_block();
  if (threadIdx.x < kChunk && first + threadIdx.x < call.pool_rows) {
    float sum = memory[threadIdx.x];
    for (int w = 1; w < kPoolWarps; ++w) sum += memory[w * kChunk + threadIdx.x];
    call.bias_grad[first + threadIdx.x] = sum;
  }
}

template <class H, class P>
const char* run_rows(const BackwardCall& call, cudaStream_t stream) {
  const int64_t h = sizeof(H), p = sizeof(P), d = call.d;
  const bool wide = aligned(call.grad.data, call.grad.stride, d, h) &&
                    aligned(call.hs.data, call.hs.stride, d, h) &&
                    aligned(call.dh.data, call.dh.stride, d, h) &&
                    aligned(call.pool.down, d, d, p) && aligned(call.pool.up, d, d, p);
  const int shift = cluster_shift(d, call.tile_count, kRowBlocks);
  const int64_t room = value_room(call.pool_rows);
  const Launch how{call.tile_count << shift,
                   1,
                   kRowWarps * 32,
                   1 << shift,
                   sums_bytes<kRowWarps, kRowSums>(d, shift, kPairs * room),
                   stream};
  return launch(wide ? backward_rows<H, P, true> : backward_rows<H, P, false>, how, call, shift,
                static_cast<int>(room));
}

template <class H, class P>
const char* run_pool(const BackwardCall& call, cudaStream_t stream) {
  const Launch how{(call.pool_rows + kChunk - 1) / kChunk,
                   (call.d + kPoolColumns - 1) / kPoolColumns,
                   kPoolWarps * 32,
                   1,
                   kPoolWarps * kChunk * kPoolColumns * static_cast<int64_t>(sizeof(float)),
                   stream};
  return launch(backward_pool<H, P>, how, call);
}

}  // namespace

const char* launch_backward_rows(const BackwardCall& call, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0 || call.pool_rows == 0) return nullptr;
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run_rows<float, float>(call, stream);
    case Dtype::bf16:
      return same ? run_rows<Bf16, Bf16>(call, stream) : run_rows<Bf16, float>(call, stream);
    default:
      return same ? run_rows<Half, Half>(call, stream) : run_rows<Half, float>(call, stream);
  }
}

const char* launch_backward_pool(const BackwardCall& call, cudaStream_t stream) {
  if (call.pool_rows == 0) return nullptr;
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run_pool<float, float>(call, stream);
    case Dtype::bf16:
      return same ? run_pool<Bf16, Bf16>(call, stream) : run_pool<Bf16, float>(call, stream);
    default:
      return same ? run_pool<Half, Half>(call, stream) : run_pool<Half, float>(call, stream);
  }
}

}  // namespace reft::cuda
