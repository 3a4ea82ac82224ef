// The forward kernel on tensor cores, for pools of h's own 16-bit dtype: 8 or 16 rows of h that
// share a range at a time, or one. A product's lanes without a row cost no bytes, and bytes and
// latency are what a step waits for; so this form serves decode and prefill, and a row has the same
// bits in both, wherever it lies among the rows of a product.
//
// A warp owns 64 columns, in an order by which every thread reads and writes 16 bytes at a time
// (docs/kernels.md, the order of columns).
#pragma once

#include "activation.cuh"
#include "in_parts.cuh"
#include "norm.cuh"
#include "ring.cuh"

namespace reft::cuda {

constexpr int kTileWarps = kUnit / 64;

// x in two parts that TF32 holds, together to 22 bits. Both parts of a finite x other than 0 have
// its sign and neither is 0, so that Inf · x is Inf: where TF32 holds all of x, the second part is
// the last place of the first. 0, Inf and NaN are all in the first.
__device__ inline void split(float x, float* high, float* low) {
  const uint32_t bits = float_bits(x);
  *high = bits_float((bits - 1) & 0xffffe000u);
  *low = x - *high;
  if ((bits & 0x7fffffffu) - 1 >= 0x7f7fffffu) *high = x, *low = 0.0f;
}

// Edits `count` ≤ kSlots rows of a tile. kOne: each block has one unit, so all of its loads (of h
// and of the first pool rows) are under way before the first product. How the sums of blocks meet
// and how pool rows come are the last two, of which nothing but speed depends.
template <class T, int kSlots, bool kOne, bool kAligned, bool kNorm,
          template <int, int, bool> class AnySums = Sums, class AnyRing = NoRing>
struct Tiles {
  using Layout = TileLayout<kSlots>;
  static constexpr int kEights = kSlots / 8, kSums = kSlots * kChunk;
  static constexpr bool kRing = AnyRing::kThere;
  static_assert(!kRing || (kAligned && !kOne), "a ring is for whole 16 bytes of several units");
  using TileSums = AnySums<kTileWarps, kSums, kOne>;
  using TileRows = Held<T, Layout, kAligned>;

  using Operands = OperandLayout<kSlots>;
  using Rows = Places<Operands>;

  static __device__ void edit(const ForwardCall& call, const TileSums& sums, const Rows& rows,
                              int count, Span span, int& turn, AnyRing& ring) {
    const T* down = static_cast<const T*>(call.pool.down) + offset(span.first, call.d);
    const T* up = static_cast<const T*>(call.pool.up) + offset(span.first, call.d);
    const int width = padded(span.rank);
    const int thread = threadIdx.x, warp = thread / 32;
    const int group = thread % 32 / 4, lane = thread % 4;  // g and t of mma16 and mma8_tf32
    float* const values = sums.values();                   // [kSlots, width]

    Eight<T> pool_down[2], pool_up[2];
    const PoolRows<T> pool{down,           up,         call.d,      span.rank,
                           width_of(call), sums.block, sums.blocks, sums.units};
    // Columns of kAligned rows count from the unit's first one, others from the row's: so the
    // compiler finds registers for either.
    const auto load_down = [&](int unit, int begin) {  // columns 16 t and 16 t + 8 of pool row g
      ring.take(pool, {0, begin, unit});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kAligned) {
          const int at = warp * 64 + 16 * lane + 8 * half,
                    left = width_of(call) - unit * kUnit - at;
          const T* from = ring.row(down, 0, begin, group, unit, call.d) + at;
          pool_down[half].template load<kAligned>(from, left, begin + group < span.rank);
        } else {
          const int col = unit * kUnit + warp * 64 + 16 * lane + 8 * half;
          pool_down[half].template load<kAligned>(down + offset(begin + group, call.d) + col,
                                                  width_of(call) - col, begin + group < span.rank);
        }
      }
      ring.give_back();
    };
    const auto load_up = [&](int unit, int begin) {  // pool rows t and t + 4, columns 8 g
      ring.take(pool, {1, begin, unit});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kAligned) {
          const int at = Layout::column(0), r = lane + 4 * half;
          const T* from = ring.row(up, 1, begin, r, unit, call.d) + at;
          pool_up[half].template load<kAligned>(from, width_of(call) - unit * kUnit - at,
                                                begin + r < span.rank);
        } else {
          const int r = begin + lane + 4 * half, col = Layout::column(unit);
          pool_up[half].template load<kAligned>(up + offset(r, call.d) + col, width_of(call) - col,
                                                r < span.rank);
        }
      }
      ring.give_back();
    };
    ring.start(pool);
    TileRows held;
    int row[kEights];
#pragma unroll
    for (int i = 0; i < kEights; ++i) row[i] = rows(call, count, i);

    for (int begin = 0; begin < span.rank; begin += kChunk, ++turn) {
      const RowActivation activation(call.pool, span, begin + thread % kChunk);
      if (!kOne && kAligned) sums.prefetch(down, up, begin, span.rank, width_of(call));
      Eight<T> x[kEights][2], next[kEights][2];  // columns of the rows, those that pool_down has
      const auto load_x = [&](Eight<T>(&x)[kEights][2], int unit) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int col = unit * kUnit + warp * 64 + 16 * lane + 8 * half;
#pragma unroll
          for (int i = 0; i < kEights; ++i) {
            x[i][half].template load<kAligned>(row_at<T>(call.h, row[i]) + col,
                                               width_of(call) - col, row[i] >= 0);
          }
        }
      };
      if (kRing) load_x(next, sums.block);
      for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
        if (kRing) {  // h comes ahead, too
#pragma unroll
          for (int i = 0; i < kEights; ++i) x[i][0] = next[i][0], x[i][1] = next[i][1];
          load_x(next, unit + sums.blocks);
        }
        load_down(unit, begin);
        if (!kRing) load_x(x, unit);
        if (kOne && begin == 0) load_up(unit, 0);
        float z[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            uint32_t a[4] = {};
#pragma unroll
            for (int i = 0; i < kEights; ++i) {
              a[i] = x[i][half].words[w], a[i + 2] = x[i][half].words[w + 1];
            }
            const uint32_t b[2] = {pool_down[half].words[w], pool_down[half].words[w + 1]};
            mma16(z, a, b, T{});
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * kEights; ++i) {
          sums.warp(unit, warp)[(group + i / 2 * 8) * kChunk + 2 * lane + i % 2] = z[i];
        }
        // From L1, while the sums meet.
        if (kOne && begin == 0) {
          Operands::pass(row, held.row);
          held.load(call.h, unit, width_of(call));
        }
        sums.close(unit, turn);
      }
      sums.meet(turn);
      if (thread < kSums && thread / kChunk < count) {
        values[thread / kChunk * width + begin + thread % kChunk] =
            activation(sums.total(thread, turn));
      }
    }
    sync_block();
    if (!kOne || span.rank == 0) Operands::pass(row, held.row);

    const NormPass<TileRows, TileSums, kOne> norm{call, sums, held, turn};
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      if (!kOne || (kNorm && span.rank == 0)) held.load(call.h, unit, width_of(call));
      if (!kNorm || span.rank > 0) {
        float delta[kEights][4][4] = {};
#pragma unroll 1
        for (int begin = 0; begin < span.rank; begin += kChunk) {
          if (!kOne || begin > 0) load_up(unit, begin);
#pragma unroll
          for (int i = 0; i < kEights; ++i) {
            const int slot = group + 8 * i;
            float high[2], low[2];  // of pool rows t and t + 4
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float v = slot < count ? values[slot * width + begin + lane + 4 * half] : 0.0f;
              split(v, &high[half], &low[half]);
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {  // columns 8 g + 2 c and 8 g + 2 c + 1
              const float a[4] = {pool_up[0][2 * c], pool_up[0][2 * c + 1], pool_up[1][2 * c],
                                  pool_up[1][2 * c + 1]};
              mma8_tf32(delta[i][c], a, low[0], low[1]);
              mma8_tf32(delta[i][c], a, high[0], high[1]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * kEights; ++i) {
          Eight<T>& out = held.x[i];
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            round_to(out[c] + delta[i / 2][c / 2][c % 2 * 2 + i % 2], &out.values[c]);
          }
        }
        held.store(call.h, unit, width_of(call));
      }
      if (kNorm) norm.add_unit(unit);
    }
    if (kNorm) norm.write();
  }
};

// Blocks that a multiprocessor is to hold: as many as the compiler finds registers for without
// spilling one. kSlots = 8 needs fewer, and kSlots = 16 reads a pool row half as often.
constexpr int tile_blocks(int slots, bool norm) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ > 900
  return slots == 8 ? 3 : 2;
#else
  return slots == 8 ? (norm ? 3 : 4) : 2;
#endif
}

// What a block does.
template <class T, int kSlots, bool kOne, bool kAligned, bool kNorm,
          template <int, int, bool> class AnySums = Sums, class AnyRing = NoRing>
__device__ void edit_tile(const ForwardCall& call, int shift, int room) {
  using Form = Tiles<T, kSlots, kOne, kAligned, kNorm, AnySums, AnyRing>;
  Form::TileSums::begin();
  const Work work(call.plan, blockIdx.x >> shift);
  const int count = work.tile.count;
  const int32_t* const places = call.plan.rows + work.tile.start;
  typename Form::Rows rows(places, count);
  if (count <= 0 || (!kNorm && work.span.rank == 0)) return;
  Form::TileSums::join();
  if (Form::TileSums::idle(call.d, shift)) return;
  int turn = 0;
  Span span = work.span;
  if (span.rank > kMostAtOnce) {
    // Sums of its own, for registers: what both ways share, the compiler keeps for both.
    const typename Form::TileSums sums(call.d, kOne || !kAligned ? anew(shift) : shift);
    edit_in_parts<T, T>(call, sums, places, count, span, room, turn);
    if (kNorm) span.rank = 0;  // what is left to do
  }
  if (span.rank <= kMostAtOnce) {
    const typename Form::TileSums sums(call.d, shift);
    AnyRing ring(sums.values() + room);
    const int step = rows_at_once(kSlots, span.rank, room);
    for (int done = 0; done < count; done += step) {
      const int left = count - done;
      if (done > 0) rows = typename Form::Rows(places + done, left);
      Form::edit(call, sums, rows, left < step ? left : step, span, turn, ring);
    }
  }
  Form::TileSums::leave(shift);
}

template <class T, int kSlots, bool kOne, bool kAligned, bool kNorm>
__global__ void __launch_bounds__(kTileWarps * 32, tile_blocks(kSlots, kNorm))
    forward_tiles(const ForwardCall call, int shift, int room) {
  edit_tile<T, kSlots, kOne, kAligned, kNorm>(call, shift, room);
}

}  // namespace reft::cuda
