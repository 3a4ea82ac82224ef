// The forward kernel on tensor cores, for pools of h's own 16-bit dtype: 16 rows of h that share a
// range at a time, or one. A product's lanes without a row cost no bytes, and bytes and latency are
// what a step waits for; so this form serves decode and prefill, and a row has the same bits in
// both.
//
// A warp owns 64 columns. A sum over columns may take them in any order that both operands share,
// and so may the columns of a result: the orders here are such that every thread reads and writes
// 16 bytes at a time, and holds in the second product the columns of h that it read for the first.
#pragma once

#include "activation.cuh"
#include "sums.cuh"

namespace reft::cuda {

constexpr int kTileWarps = kUnit / 64;
constexpr int kTileSums = kTile * kChunk;
using TileSums = Sums<kTileWarps, kTileSums>;

// x in two parts that TF32 holds, together to 22 bits. What is not finite is all in the first.
__device__ inline void split(float x, float* high, float* low) {
  *high = bits_float(float_bits(x) & 0xffffe000u);
  *low = x - *high;
  if (!(fabsf(x) <= 3.4028235e38f)) *high = x, *low = 0.0f;
}

// Edits `count` ≤ 16 rows of a tile. kOne: each block has one unit, so all of its loads (of h and
// of the first pool rows) are under way before the first product.
template <class T, bool kOne, bool kAligned>
__device__ void edit_tile(const ForwardCall& call, const TileSums& sums, const int32_t* rows,
                          int count, Span span, int& turn) {
  const T* down = static_cast<const T*>(call.pool.down) + span.first * call.d;
  const T* up = static_cast<const T*>(call.pool.up) + span.first * call.d;
  const int width = padded(span.rank);
  const int thread = threadIdx.x, warp = thread / 32;
  const int group = thread % 32 / 4, lane = thread % 4;  // g and t of mma16 and mma8_tf32
  float* const values = sums.values();                   // [16, width]

  T* row[2];  // rows g and g + 8
  bool live[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t index = group + 8 * i < count ? rows[group + 8 * i] : -1;
    live[i] = index >= 0 && index < call.row_count;
    row[i] = static_cast<T*>(call.h.data) + (live[i] ? index * call.h.stride : 0);
  }
  Eight<T> x[2][2], pool_up[2];  // x: two rows, columns 16 t and 16 t + 8
  const auto load_x = [&](int64_t col) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = col + 16 * lane + 8 * half;
        x[i][half].template load<kAligned>(row[i] + at, call.d - at, live[i]);
      }
    }
  };
  const auto load_up = [&](int64_t col, int begin) {  // pool rows t and t + 4, columns 8 g
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = begin + lane + 4 * half;
      const int64_t at = col + 8 * group;
      pool_up[half].template load<kAligned>(up + r * call.d + at, call.d - at, r < span.rank);
    }
  };

  for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
    const Bend bend(call.pool, span, begin + thread % kChunk);
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      const int64_t col = int64_t{unit} * kUnit + warp * 64;
      Eight<T> pool[2];  // pool row g, columns 16 t and 16 t + 8
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = col + 16 * lane + 8 * half;
        pool[half].template load<kAligned>(down + (begin + group) * call.d + at, call.d - at,
                                           begin + group < span.rank);
      }
      if (!kOne || begin == 0) load_x(col);
      if (kOne && begin == 0) load_up(col, 0);
      float z[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
          const uint32_t a[4] = {x[0][half].words[w], x[1][half].words[w], x[0][half].words[w + 1],
                                 x[1][half].words[w + 1]};
          const uint32_t b[2] = {pool[half].words[w], pool[half].words[w + 1]};
          mma16(z, a, b, T{});
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.warp(warp)[(group + i / 2 * 8) * kChunk + 2 * lane + i % 2] = z[i];
      }
      sums.close_unit(unit, turn);
    }
    sync_cluster(sums.blocks);
    if (thread < kTileSums && thread / kChunk < count) {
      values[thread / kChunk * width + begin + thread % kChunk] = bend(sums.total(thread, turn));
    }
  }
  sync_block();

  for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
    const int64_t col = int64_t{unit} * kUnit + warp * 64;
    if (!kOne) load_x(col);
    float delta[8][4] = {};
    for (int begin = 0; begin < span.rank; begin += kChunk) {
      if (!kOne || begin > 0) load_up(col, begin);
      float high[4], low[4];  // rows g and g + 8 of pool row t, then of t + 4
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = group + i % 2 * 8;
        const float v = slot < count ? values[slot * width + begin + lane + i / 2 * 4] : 0.0f;
        split(v, &high[i], &low[i]);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {  // columns c, 8 + c, …, 56 + c
        const float b0 = pool_up[0][c], b1 = pool_up[1][c];
        mma8_tf32(delta[c], low, b0, b1);
        mma8_tf32(delta[c], high, b0, b1);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Eight<T>& out = x[i][half];
#pragma unroll
        for (int c = 0; c < 8; ++c) round_to(out[c] + delta[c][2 * i + half], &out.values[c]);
        const int64_t at = col + 16 * lane + 8 * half;
        if (live[i]) out.template store<kAligned>(row[i] + at, call.d - at);
      }
    }
  }
}

template <class T, bool kOne, bool kAligned>
__global__ void __launch_bounds__(kTileWarps * 32, 2)
    forward_tiles(const ForwardCall call, int cluster, int room) {
  const Tile tile = call.plan.tiles[blockIdx.x / cluster];
  if (tile.count <= 0) return;
  const Span span = call.plan.spans[tile.segment];
  if (span.rank <= 0) return;
  const int fit = room / padded(span.rank);
  if (fit == 0) stop_kernel();
  const int step = fit < kTile ? fit : kTile;
  const TileSums sums(call.d, cluster);
  int turn = 0;
  for (int done = 0; done < tile.count; done += step) {
    const int left = tile.count - done;
    edit_tile<T, kOne, kAligned>(call, sums, call.plan.rows + tile.start + done,
                                 left < step ? left : step, span, turn);
  }
  sync_cluster(cluster);  // another block may still read this one's sums
}

}  // namespace reft::cuda
