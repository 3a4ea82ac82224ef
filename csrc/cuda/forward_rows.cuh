// The forward kernel in float32 multiply-adds, for pools in float32: a thread owns eight columns of
// h and of every pool row that meets them.
#pragma once

#include "activation.cuh"
#include "in_parts.cuh"
#include "norm.cuh"

namespace reft::cuda {

constexpr int kRowWarps = kUnit / (32 * 8);
constexpr int kRowBlocks = 4;  // a multiprocessor
constexpr int kRowsAtOnce = 4;
constexpr int kRowSums = kRowsAtOnce * kChunk;
template <bool kOne>
using RowSums = Sums<kRowWarps, kRowSums, kOne>;

// Edits `count` ≤ kRows rows of a tile. kOne: each block has one unit, so its columns of h and of
// the first pool rows stay in registers from the first product to the second.
template <class H, class P, bool kOne, bool kAligned, bool kNorm, int kRows>
__device__ void edit_rows(const ForwardCall& call, const RowSums<kOne>& sums,
                          const Places<RowLayout<kRows>>& rows, int count, Span span, int& turn) {
  using Layout = RowLayout<kRows>;
  const P* down = static_cast<const P*>(call.pool.down) + offset(span.first, call.d);
  const P* up = static_cast<const P*>(call.pool.up) + offset(span.first, call.d);
  const int thread = threadIdx.x;
  const int width = padded(span.rank);
  float* const values = sums.values();  // [kRows, width]

  constexpr bool kUpFirst = kOne && kRows == 1;
  Eight<P> pool_down[kChunk], first_up[kUpFirst ? kChunk : 1];
  const auto load_down = [&](int unit, int begin) {
    const int col = Layout::column(unit);
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      pool_down[r].template load<kAligned>(down + offset(begin + r, call.d) + col,
                                           width_of(call) - col, begin + r < span.rank);
    }
  };
  if (kOne) load_down(sums.block, 0);  // before the rows are known
  if (kUpFirst) {
    const int col = Layout::column(sums.block);
#pragma unroll
    for (int r = 0; r < (kUpFirst ? kChunk : 1); ++r) {
      first_up[r].template load<kAligned>(up + offset(r, call.d) + col, width_of(call) - col,
                                          r < span.rank);
    }
  }
  Held<H, Layout, kAligned> held;
#pragma unroll
  for (int i = 0; i < kRows; ++i) held.row[i] = rows(call, count, i);

  for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
    const RowActivation activation(call.pool, span, begin + thread % kChunk);
    if (!kOne && kAligned) sums.prefetch(down, up, begin, span.rank, width_of(call));
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      if (!kOne || begin > 0) load_down(unit, begin);
      if (!kOne || begin == 0) held.load(call.h, unit, width_of(call));
      float z[kRows * kChunk];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float wide[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) wide[c] = held.x[i][c];
#pragma unroll
        for (int r = 0; r < kChunk; ++r) z[i * kChunk + r] = dot(pool_down[r], wide, 0.0f);
      }
      Layout::add_up(z, sums.warp(unit, thread / 32));
      sums.template close<kRows * kChunk>(unit, turn);
    }
    sums.meet(turn);
    if (thread < kRows * kChunk) {
      values[thread / kChunk * width + begin + thread % kChunk] =
          activation(sums.total(thread, turn));
    }
  }
  sync_block();

  const NormPass<Held<H, Layout, kAligned>, RowSums<kOne>, kOne> norm{call, sums, held, turn};
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
      if (kUpFirst) {
#pragma unroll
        for (int r = 0; r < (kUpFirst ? kChunk : 1); ++r) {
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
  const Work work(call.plan, blockIdx.x >> shift);
  const int count = work.tile.count;
  const int32_t* const places = call.plan.rows + work.tile.start;
  const Places<RowLayout<kRowsAtOnce>> first(places, count);
  if (count <= 0 || (!kNorm && work.span.rank == 0)) return;
  int turn = 0;
  Span span = work.span;
  if (span.rank > kMostAtOnce) {
    const RowSums<kOne> sums(call.d, anew(shift));
    edit_in_parts<H, P>(call, sums, places, count, span, room, turn);
    if (kNorm) span.rank = 0;  // what is left to do
  }
  const RowSums<kOne> sums(call.d, shift);
  const bool several = rows_at_once(kRowsAtOnce, span.rank, room) == kRowsAtOnce;
  for (int done = 0; done < count && span.rank <= kMostAtOnce;) {
    const int left = count - done;
    if (left > 1 && several) {
      Places<RowLayout<kRowsAtOnce>> rows = first;
      if (done > 0) rows = Places<RowLayout<kRowsAtOnce>>(places + done, left);
      edit_rows<H, P, kOne, kAligned, kNorm, kRowsAtOnce>(call, sums, rows, left, span, turn);
      done += kRowsAtOnce;
    } else {
      Places<RowLayout<1>> row(places + done, done > 0 ? left : 0);
      if (done == 0) row.row[0] = first.row[0];
      edit_rows<H, P, kOne, kAligned, kNorm, 1>(call, sums, row, left, span, turn);
      done += 1;
    }
  }
  leave_cluster(1 << shift);  // another block may still read this one's sums
}

}  // namespace reft::cuda
