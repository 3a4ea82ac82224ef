// The forward kernel in float32 multiply-adds, for pools in float32: a thread owns eight columns of
// h and of every pool row that meets them.
#pragma once

#include "activation.cuh"
#include "norm.cuh"

namespace reft::cuda {

constexpr int kRowWarps = kUnit / (32 * 8);
constexpr int kRowBlocks = 4;  // a multiprocessor
constexpr int kRowsAtOnce = 4;
constexpr int kRowSums = kRowsAtOnce * kChunk;
using RowSums = Sums<kRowWarps, kRowSums>;

// Edits `count` ≤ kRows rows of a tile. kOne: each block has one unit, so its columns of h and of
// the first pool rows stay in registers from the first product to the second.
template <class H, class P, bool kOne, bool kAligned, bool kNorm, int kRows>
__device__ void edit_rows(const ForwardCall& call, const RowSums& sums, const int32_t* rows,
                          int count, Span span, int& turn) {
  using Layout = RowLayout<kRows>;
  const P* down = static_cast<const P*>(call.pool.down) + offset(span.first, call.d);
  const P* up = static_cast<const P*>(call.pool.up) + offset(span.first, call.d);
  const int width = padded(span.rank);
  const int thread = threadIdx.x;
  float* const values = sums.values();  // [kRows, width]

  Held<H, Layout, kAligned> held(call, rows, count);
  Eight<P> first_up[kOne && kRows == 1 ? kChunk : 1];

  for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
    const Bend bend(call.pool, span, begin + thread % kChunk);
    if (!kOne && kAligned) sums.prefetch(down, up, begin, span.rank, width_of(call));
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      const int col = Layout::column(unit);
      Eight<P> pool[kChunk];
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        pool[r].template load<kAligned>(down + offset(begin + r, call.d) + col,
                                        width_of(call) - col, begin + r < span.rank);
      }
      if (!kOne || begin == 0) held.load(call.h, unit, width_of(call));
      if (kOne && kRows == 1 && begin == 0) {
#pragma unroll
        for (int r = 0; r < kChunk; ++r) {
          first_up[r].template load<kAligned>(up + offset(r, call.d) + col, width_of(call) - col,
                                              r < span.rank);
        }
      }
      float z[kRows * kChunk];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float wide[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) wide[c] = held.x[i][c];
#pragma unroll
        for (int r = 0; r < kChunk; ++r) z[i * kChunk + r] = dot(pool[r], wide, 0.0f);
      }
      Layout::add_up(z, sums.warp(thread / 32));
      sums.template close_unit<kRows * kChunk>(unit, turn);
    }
    sync_cluster(sums.blocks);
    if (thread < kRows * kChunk) {
      values[thread / kChunk * width + begin + thread % kChunk] = bend(sums.total(thread, turn));
    }
  }
  sync_block();

  const NormPass<Held<H, Layout, kAligned>, RowSums, kOne> norm{call, sums, held, turn};
  for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
    const int col = Layout::column(unit);
    if (!kOne || (kNorm && span.rank == 0)) held.load(call.h, unit, width_of(call));
    if (!kNorm || span.rank > 0) {
      float delta[kRows][8] = {};
      const auto add = [&](const Eight<P>& pool, int r) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int c = 0; c < 8; ++c)
            delta[i][c] = fmaf(values[i * width + r], pool[c], delta[i][c]);
        }
      };
      int done = 0;
      if (kOne && kRows == 1) {
#pragma unroll
        for (int r = 0; r < kChunk; ++r) {
          if (r < span.rank) add(first_up[r], r);
        }
        done = kChunk;
      }
#pragma unroll 4
      for (int r = done; r < span.rank; ++r) {
        Eight<P> pool;
        pool.template load<kAligned>(up + offset(r, call.d) + col, width_of(call) - col, true);
        add(pool, r);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        Eight<H>& out = held.x[i];
#pragma unroll
        for (int c = 0; c < 8; ++c) round_to(out[c] + delta[i][c], &out.values[c]);
      }
      held.store(call.h, unit, width_of(call));
    }
    if (kNorm) norm.add_unit(unit);
  }
  if (kNorm) norm.write();
}

template <class H, class P, bool kOne, bool kAligned, bool kNorm>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks)
    forward_rows(const ForwardCall call, int shift, int room) {
  const Tile tile = call.plan.tiles[blockIdx.x >> shift];
  if (tile.count <= 0) return;
  const Span span = range_of(call.plan, tile);
  if (!kNorm && span.rank <= 0) return;
  const int fit = span.rank > 0 ? room / padded(span.rank) : kRowsAtOnce;
  if (fit == 0) stop_kernel();
  const RowSums sums(call.d, shift);
  const int32_t* rows = call.plan.rows + tile.start;
  int turn = 0, done = 0;
  while (done < tile.count) {
    const int left = tile.count - done;
    if (left > 1 && fit >= kRowsAtOnce) {
      edit_rows<H, P, kOne, kAligned, kNorm, kRowsAtOnce>(call, sums, rows + done, left, span,
                                                          turn);
      done += kRowsAtOnce;
    } else {
      edit_rows<H, P, kOne, kAligned, kNorm, 1>(call, sums, rows + done, left, span, turn);
      done += 1;
    }
  }
  leave_cluster(1 << shift);  // another block may still read this one's sums
}

}  // namespace reft::cuda
