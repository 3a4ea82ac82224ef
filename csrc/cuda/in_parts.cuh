// Ranges of more pool rows than values of a row fit in shared memory: right at any rank, and slow.
#pragma once

#include "activation.cuh"
#include "held.cuh"

namespace reft::cuda {

// Edits `count` rows of a tile, one at a time and a part of the pool rows at a time, in float32
// multiply-adds. What a part adds to the columns of this block's units is carried on in shared
// memory, for h itself must stay as it is until all of D has met it.
template <class H, class P, class Sums>
__device__ void edit_in_parts(const ForwardCall& call, const Sums& sums, const int32_t* rows,
                              int count, Span span, int room, int& turn) {
  constexpr int kThreads = Sums::kThreads;
  const P* down = static_cast<const P*>(call.pool.down) + offset(span.first, call.d);
  const P* up = static_cast<const P*>(call.pool.up) + offset(span.first, call.d);
  const int thread = threadIdx.x, part = part_of(room, sums.share());
  float* const values = sums.values();
  for (int done = 0; done < count; ++done) {
    const int row = rows[done];
    if (row < 0 || row >= call.row_count) continue;
    H* const h = row_at<H>(call.h, row);
    for (int from = 0; from < span.rank; from += part) {
      const int to = span.rank - from < part ? span.rank : from + part;
      for (int begin = from; begin < to; begin += kChunk, ++turn) {
        const RowActivation activation(call.pool, span, begin + thread % kChunk);
        for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
          float z[kChunk] = {};
          for (int i = thread; i < kUnit; i += kThreads) {
            const int col = unit * kUnit + i;
            if (col >= call.d) break;
            const float x = to_float(h[col]);
#pragma unroll
            for (int r = 0; r < kChunk; ++r) {
              if (begin + r >= to) break;
              z[r] = fmaf(to_float(down[offset(begin + r, call.d) + col]), x, z[r]);
            }
          }
          RowLayout<1>::add_up(z, sums.warp(unit, thread / 32));
          sums.template close<kChunk>(unit, turn);
        }
        sums.template meet<kChunk>(turn);
        if (thread < kChunk) values[begin - from + thread] = activation(sums.total(thread, turn));
      }
      sync_block();
      for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
        float* const carried = values + part + sums.number(unit) * kUnit;
        for (int i = thread; i < kUnit; i += kThreads) {
          const int col = unit * kUnit + i;
          if (col >= call.d) break;
          float sum = from > 0 ? carried[i] : 0.0f;
          for (int r = from; r < to; ++r) {
            sum = fmaf(values[r - from], to_float(up[offset(r, call.d) + col]), sum);
          }
          if (to < span.rank) {
            carried[i] = sum;
          } else {
            round_to(to_float(h[col]) + sum, &h[col]);
          }
        }
      }
    }
  }
  sync_block();  // other threads may read what this one wrote
}

}  // namespace reft::cuda
