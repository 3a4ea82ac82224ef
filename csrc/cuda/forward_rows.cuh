// The forward kernel in float32 multiply-adds, for pools in float32: a thread owns eight columns of
// h and of every pool row that meets them.
#pragma once

#include "activation.cuh"
#include "sums.cuh"

namespace reft::cuda {

constexpr int kRowWarps = kUnit / (32 * 8);
constexpr int kRowsAtOnce = 4;
constexpr int kRowSums = kRowsAtOnce * kChunk;
using RowSums = Sums<kRowWarps, kRowSums>;

// Edits `count` ≤ kRows rows of a tile. kOne: each block has one unit, so its columns of h and of
// the first pool rows stay in registers from the first product to the second.
template <class H, class P, bool kOne, bool kAligned, int kRows>
__device__ void edit_rows(const ForwardCall& call, const RowSums& sums, const int32_t* rows,
                          int count, Span span, int& turn) {
  const P* down = static_cast<const P*>(call.pool.down) + span.first * call.d;
  const P* up = static_cast<const P*>(call.pool.up) + span.first * call.d;
  const int width = padded(span.rank);
  const int thread = threadIdx.x;
  float* const values = sums.values();  // [kRows, width]

  H* row[kRows];
  bool live[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t index = i < count ? rows[i] : -1;
    live[i] = index >= 0 && index < call.row_count;
    row[i] = static_cast<H*>(call.h.data) + (live[i] ? index * call.h.stride : 0);
  }
  Eight<H> x[kRows];
  Eight<P> first_up[kOne && kRows == 1 ? kChunk : 1];
  const auto load_x = [&](int64_t col) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      x[i].template load<kAligned>(row[i] + col, call.d - col, live[i]);
  };

  for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
    const Bend bend(call.pool, span, begin + thread % kChunk);
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      const int64_t col = int64_t{unit} * kUnit + thread * 8;
      Eight<P> pool[kChunk];
#pragma unroll
      for (int r = 0; r < kChunk; ++r) {
        pool[r].template load<kAligned>(down + (begin + r) * call.d + col, call.d - col,
                                        begin + r < span.rank);
      }
      if (!kOne || begin == 0) load_x(col);
      if (kOne && kRows == 1 && begin == 0) {
#pragma unroll
        for (int r = 0; r < kChunk; ++r) {
          first_up[r].template load<kAligned>(up + r * call.d + col, call.d - col, r < span.rank);
        }
      }
      float z[kRows * kChunk];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float wide[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) wide[c] = x[i][c];
#pragma unroll
        for (int r = 0; r < kChunk; ++r) z[i * kChunk + r] = dot(pool[r], wide, 0.0f);
      }
      const float total = warp_total(z);
      const int lanes = 32 / (kRows * kChunk);  // that hold the same value
      if (thread % lanes == 0) sums.warp(thread / 32)[thread % 32 / lanes] = total;
      sums.close_unit(unit, turn);
    }
    sync_cluster(sums.blocks);
    if (thread < kRows * kChunk) {
      values[thread / kChunk * width + begin + thread % kChunk] = bend(sums.total(thread, turn));
    }
  }
  sync_block();

  for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
    const int64_t col = int64_t{unit} * kUnit + thread * 8;
    if (!kOne) load_x(col);
    float delta[kRows][8] = {};
    const auto add = [&](const Eight<P>& pool, int r) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int c = 0; c < 8; ++c) delta[i][c] = fmaf(values[i * width + r], pool[c], delta[i][c]);
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
      pool.template load<kAligned>(up + r * call.d + col, call.d - col, true);
      add(pool, r);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) round_to(x[i][c] + delta[i][c], &x[i].values[c]);
      if (live[i]) x[i].template store<kAligned>(row[i] + col, call.d - col);
    }
  }
}

template <class H, class P, bool kOne, bool kAligned>
__global__ void __launch_bounds__(kRowWarps * 32, 4)
    forward_rows(const ForwardCall call, int cluster, int room) {
  const Tile tile = call.plan.tiles[blockIdx.x / cluster];
  if (tile.count <= 0) return;
  const Span span = call.plan.spans[tile.segment];
  if (span.rank <= 0) return;
  const int fit = room / padded(span.rank);
  if (fit == 0) stop_kernel();
  const RowSums sums(call.d, cluster);
  const int32_t* rows = call.plan.rows + tile.start;
  int turn = 0, done = 0;
  while (done < tile.count) {
    const int left = tile.count - done;
    if (left > 1 && fit >= kRowsAtOnce) {
      edit_rows<H, P, kOne, kAligned, kRowsAtOnce>(call, sums, rows + done, left, span, turn);
      done += kRowsAtOnce;
    } else {
      edit_rows<H, P, kOne, kAligned, 1>(call, sums, rows + done, left, span, turn);
      done += 1;
    }
  }
  sync_cluster(cluster);  // another block may still read this one's sums
}

}  // namespace reft::cuda
