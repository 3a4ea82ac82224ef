// The second backward kernel: gradients of the pool, from p and v that the first has kept.
//
// A cluster of blocks owns 8 pool rows and 64 columns. It walks the segments that own some of these
// pool rows, in order: segments may share pool rows, and each sum has one place, so there are no
// atomics. A segment's rows are dealt out in groups to eight slices, and the slices to the blocks;
// a slice's warps are added in order, then the slices are. So the bits do not depend on how many
// blocks there are, and few pool rows with many rows still fill the chip.
#pragma once

#include "activation.cuh"
#include "held.cuh"

namespace reft::cuda {

constexpr int kPoolWarps = 4;
constexpr int kPoolColumns = 64;  // two for each lane
constexpr int kRowsAhead = 4;     // rows that a warp reads at once
constexpr int kSlices = kLargestCluster;
constexpr int kGroupRows = 64;                      // that a slice takes in turn
constexpr int kPoolSums = kChunk * kPoolColumns;    // of D, and as many of U
constexpr int kSliceSums = 2 * kPoolSums + kChunk;  // and of c

inline int64_t pool_bytes(int shift) {
  const int64_t floats = kPoolWarps * kPoolSums + (kSlices >> shift) * kSliceSums;
  return static_cast<int64_t>(sizeof(float)) * floats;
}

// p and v of pool rows first + begin to first + end, for a row with x and g, computed by one warp.
// Those of the eight that are not in between are not read: they belong to others.
template <class H, class P>
__device__ void again(const BackwardCall& call, const H* x, const H* g, int first, int begin,
                      int end, float (&p)[kChunk], float (&v)[kChunk]) {
  float z[kChunk] = {}, w[kChunk] = {};
  for (int col = threadIdx.x % 32; col < width_of(call); col += 32) {
    const float xc = to_float(x[col]), gc = to_float(g[col]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j >= begin && j < end) {
        const int64_t place = offset(first + j, call.d) + col;
        z[j] = fmaf(xc, to_float(static_cast<const P*>(call.pool.down)[place]), z[j]);
        w[j] = fmaf(gc, to_float(static_cast<const P*>(call.pool.up)[place]), w[j]);
      }
    }
  }
  // Each lane makes p and v of one pool row, so their code stands here once.
  const int lane = threadIdx.x % 32, mine = lane % kChunk;
  float my_z = 0.0f, my_w = 0.0f;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      z[j] += shuffle_xor(z[j], lanes);
      w[j] += shuffle_xor(w[j], lanes);
    }
    if (j == mine) my_z = z[j], my_w = w[j];
  }
  float my_p = 0.0f, my_v = 0.0f;
  if (mine >= begin && mine < end) {
    const RowActivation activation(call.pool, Span{first, end}, mine);
    my_v = activation(my_z);
    my_p = activation.slope(my_z) * my_w;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    p[j] = bits_float(shuffle(float_bits(my_p), j));
    v[j] = bits_float(shuffle(float_bits(my_v), j));
  }
}

// Pool rows of a segment among the eight from `first` on: [skip, end), none where skip is not less.
struct Overlap {
  int skip, end;

  __device__ Overlap(Span span, int first) {
    const int from = span.first - first, to = from + span.rank;
    skip = from > 0 ? from : 0;
    end = to < kChunk ? to : kChunk;
    if (span.rank <= 0) end = 0;
  }
  __device__ bool any() const { return skip < end; }
};

// What a thread adds up: two columns of eight pool rows.
struct PoolParts {
  float down[kChunk][2] = {}, up[kChunk][2] = {}, bias[kChunk] = {};

  // The rows of a group, every fourth for this warp. kFresh: p and v were not kept.
  template <class H, class P, bool kFresh>
  __device__ void add(const BackwardCall& call, Span span, Overlap rows, int first, int group,
                      int group_end, int col) {
    constexpr int kAhead = kFresh ? 1 : kRowsAhead;
    const int column = first - span.first;  // of pool row `first` in p and v
    for (int at = group + threadIdx.x / 32; at < group_end; at += kPoolWarps * kAhead) {
      float x[kAhead][2], g[kAhead][2];
      bool live[kAhead];
      int row[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int position = at + i * kPoolWarps;
        row[i] = position < group_end ? call.plan.rows[position] : -1;
        live[i] = row[i] >= 0 && row[i] < call.row_count;
        const H* xs = row_at<H>(call.hs, position);
        const H* gs = row_at<H>(call.grad, row[i]);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[i][c] = live[i] && col + c < width_of(call) ? to_float(xs[col + c]) : 0.0f;
          g[i][c] = live[i] && col + c < width_of(call) ? to_float(gs[col + c]) : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!live[i]) continue;
        const int position = at + i * kPoolWarps;
        float p[kChunk], v[kChunk];
        if constexpr (kFresh) {
          again<H, P>(call, row_at<H>(call.hs, position), row_at<H>(call.grad, row[i]), first,
                      rows.skip, rows.end, p, v);
        } else {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) {
            const bool mine = j >= rows.skip && j < rows.end;
            p[j] = mine ? call.p[int64_t{position} * kKept + column + j] : 0.0f;
            v[j] = mine ? call.v[int64_t{position} * kKept + column + j] : 0.0f;
          }
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (j < rows.skip || j >= rows.end) continue;  // 0 · Inf of a row that is not its own
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            down[j][c] = fmaf(p[j], x[i][c], down[j][c]);
            up[j][c] = fmaf(v[j], g[i][c], up[j][c]);
          }
          bias[j] += p[j];
        }
      }
    }
  }

  // Adds the warps' sums in order: kSliceSums of them.
  __device__ void close(float* warps, float* slice) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    close_side(down, warps, slice);
    close_side(up, warps, slice + kPoolSums);
    sync_block();
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) warps[warp * kChunk + j] = bias[j];
    }
    sync_block();
    if (threadIdx.x < kChunk) {
      float sum = warps[threadIdx.x];
      for (int w = 1; w < kPoolWarps; ++w) sum += warps[w * kChunk + threadIdx.x];
      slice[2 * kPoolSums + threadIdx.x] = sum;
    }
  }

 private:
  static __device__ void close_side(const float (&sums)[kChunk][2], float* warps, float* slice) {
    sync_block();
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const int lane = threadIdx.x % 32, place = (threadIdx.x / 32 * kChunk + j) * kPoolColumns;
      warps[place + 2 * lane] = sums[j][0];
      warps[place + 2 * lane + 1] = sums[j][1];
    }
    sync_block();
    for (int i = threadIdx.x; i < kPoolSums; i += kPoolWarps * 32) {
      float sum = warps[i];
      for (int w = 1; w < kPoolWarps; ++w) sum += warps[w * kPoolSums + i];
      slice[i] = sum;
    }
  }
};

template <class H, class P>
__global__ void __launch_bounds__(kPoolWarps * 32, 2)
    backward_pool(const BackwardCall call, int shift) {
  const int blocks = 1 << shift, block = static_cast<int>(blockIdx.x) & (blocks - 1);
  const int first = static_cast<int>(blockIdx.x >> shift) * kChunk;
  const int begin = static_cast<int>(blockIdx.y) * kPoolColumns;
  const int col = begin + 2 * (threadIdx.x % 32);
  float* const warps = shared_memory();  // [kPoolWarps, kPoolSums]
  float* const slices = warps + kPoolWarps * kPoolSums;

  // Those that own some of these pool rows.
  const Segments owners(call.plan, call.segments,
                        [first](Span span) { return Overlap(span, first).any(); });
  const int s_begin = owners.begin, s_end = owners.end;
  for (int slice = block; slice < kSlices && s_begin < s_end; slice += blocks) {
    PoolParts parts;
    bool used = false;
    for (int s = s_begin; s < s_end; ++s) {
      const Span span = call.plan.spans[s];
      const Overlap rows(span, first);
      if (!rows.any()) continue;
      const int end = call.offsets[s + 1];
      for (int at = call.offsets[s] + slice * kGroupRows; at < end; at += kSlices * kGroupRows) {
        used = true;
        const int to = end - at < kGroupRows ? end : at + kGroupRows;
        if (span.rank <= kKept) {
          parts.template add<H, P, false>(call, span, rows, first, at, to, col);
        } else {
          parts.template add<H, P, true>(call, span, rows, first, at, to, col);
        }
      }
    }
    float* const mine = slices + (slice >> shift) * kSliceSums;
    if (used) {
      parts.close(warps, mine);
    } else {
      for (int i = threadIdx.x; i < kSliceSums; i += kPoolWarps * 32) mine[i] = 0.0f;
    }
  }
  if (s_begin < s_end) sync_cluster(blocks);

  P* const down = static_cast<P*>(call.pool_grad.down);
  P* const up = static_cast<P*>(call.pool_grad.up);
  for (int i = threadIdx.x + block * kPoolWarps * 32; i < kSliceSums;
       i += blocks * kPoolWarps * 32) {
    const int row = first + (i < 2 * kPoolSums ? i % kPoolSums / kPoolColumns : i % kChunk);
    const int at = begin + i % kPoolColumns;
    if (row >= call.pool_rows || (i < 2 * kPoolSums ? at >= call.d : blockIdx.y != 0)) continue;
    float sum = 0.0f;
    if (s_begin < s_end) {
      float part[kSlices];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        part[s] = load_cluster(slices + (s >> shift) * kSliceSums + i, s & (blocks - 1));
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) sum = s == 0 ? part[0] : sum + part[s];
    }
    if (i < kPoolSums) {
      round_to(call.pool.kind[row] & kNoProduct ? 0.0f : sum, &down[offset(row, call.d) + at]);
    } else if (i < 2 * kPoolSums) {
      round_to(sum, &up[offset(row, call.d) + at]);
    } else {
      call.bias_grad[row] = sum;
    }
  }
  if (s_begin < s_end) leave_cluster(blocks);  // another block may still read this one's sums
}

}  // namespace reft::cuda
