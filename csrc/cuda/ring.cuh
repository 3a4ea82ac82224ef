// A ring of bulk copies, for blocks with several units: the pool rows of the next units are on
// their way into shared memory while a unit is worked on. They are taken in a fixed order, first D
// of every unit and then U, so nothing of the arithmetic changes.
#pragma once

#include "async.cuh"
#include "sums.cuh"

namespace reft::cuda {

// A range's pool rows, and the units of them that are a block's.
template <class P>
struct PoolRows {
  const P *down, *up;
  int64_t stride;
  int rank, width, block, blocks, units;
};

// Up to eight pool rows in the columns of one unit.
struct PoolItem {
  int side;  // 0: D, 1: U, 2: none
  int begin, unit;
};

// No ring: pool rows are read where they lie.
struct NoRing {
  static constexpr bool kThere = false;

  __device__ explicit NoRing(float*) {}
  template <class P>
  __device__ void start(const PoolRows<P>&) const {}
  template <class P>
  __device__ void take(const PoolRows<P>&, PoolItem) const {}
  __device__ void give_back() const {}
  // Row begin + r of `rows`, from the unit's first column on.
  template <class P>
  __device__ const P* row(const P* rows, int, int begin, int r, int unit, int64_t stride) const {
    return rows + offset(begin + r, stride) + unit * kUnit;
  }
};

// Places for kStages items, an item being up to eight pool rows of D or of U in the columns of one
// unit. An item is asked for when the one before the last that took its place was read by all
// warps: so kStages − 1 are on their way or waiting.
template <class P>
struct Ring {
  static constexpr bool kThere = true;
  static constexpr int kStages = 3, kWarps = kUnit / 64;
  // From one pool row to the next, so that the eight lanes that are served together find their 16
  // bytes in different banks: of D they read two rows in four places 32 bytes apart, of U four rows
  // in two places side by side.
  static __device__ int pitch(int side) { return kUnit * sizeof(P) + 16 * (1 + side); }
  static constexpr int kStage = kChunk * (kUnit * sizeof(P) + 32);
  static constexpr int kBarriers = 64;  // bytes that they take
  static constexpr int kBytes = kBarriers + kStages * kStage;
  static_assert(2 * kStages * sizeof(uint64_t) <= kBarriers);

  char* memory;
  int taken = 0;  // items so far

  // Its barriers are there for the whole block when this is made.
  __device__ explicit Ring(float* room) : memory(reinterpret_cast<char*>(room)) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kWarps);
      }
      publish_barriers();
    }
    sync_block();
  }

  // Asks for the first items. All threads call this, and `take` and `give_back` for each item in
  // its turn.
  __device__ void start(const PoolRows<P>& source) const {
    if (threadIdx.x >= 32) return;
    PoolItem item{0, 0, source.block};
    for (int ahead = 0; ahead < kStages - 1; ++ahead) {
      ask(source, item, taken + ahead);
      item = after(source, item);
    }
  }

  // Waits until the item has come; asks for a later one.
  __device__ void take(const PoolRows<P>& source, PoolItem item) const {
    if (threadIdx.x < 32) {
      for (int ahead = 0; ahead < kStages - 1; ++ahead) item = after(source, item);
      ask(source, item, taken + kStages - 1);
    }
    wait_for(full(taken % kStages), taken / kStages % 2);
  }
  // Row r of the item that was taken, from the unit's first column on.
  __device__ const P* row(const P*, int side, int, int r, int, int64_t) const {
    return reinterpret_cast<const P*>(stage(taken % kStages) + r * pitch(side));
  }
  // This thread has read what it needs.
  __device__ void give_back() {
    sync_warp();
    if (threadIdx.x % 32 == 0) arrive(empty(taken % kStages));
    ++taken;
  }

 private:
  __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(memory) + stage; }
  __device__ uint64_t* empty(int stage) const { return full(kStages + stage); }
  __device__ char* stage(int number) const { return memory + kBarriers + number * kStage; }

  static __device__ PoolItem after(const PoolRows<P>& source, PoolItem item) {
    if (item.side > 1) return item;
    const bool up = item.side == 1;
    const int begin = item.begin + kChunk, unit = item.unit + source.blocks;
    const bool rows_end = begin >= source.rank, units_end = unit >= source.units;
    if (up ? rows_end : units_end) {
      if (up ? units_end : rows_end) return {item.side + 1, 0, source.block};
      return up ? PoolItem{1, 0, unit} : PoolItem{0, begin, source.block};
    }
    return up ? PoolItem{1, begin, item.unit} : PoolItem{0, item.begin, unit};
  }

  // By the first warp: a lane for each row. Waits until all warps have read what was there.
  __device__ void ask(const PoolRows<P>& source, PoolItem item, int number) const {
    if (item.side > 1) return;
    const int place = number % kStages, lane = threadIdx.x;
    const int left = source.rank - item.begin, rows = left < kChunk ? left : kChunk;
    const int col = item.unit * kUnit, columns = source.width - col;
    const int bytes = (columns < kUnit ? columns : kUnit) * static_cast<int>(sizeof(P));
    if (number >= kStages) wait_for(empty(place), (number / kStages + 1) % 2);
    if (lane == 0) arrive_announcing(full(place), rows * bytes);
    if (lane < rows) {
      const P* from =
          (item.side ? source.up : source.down) + offset(item.begin + lane, source.stride);
      copy_bulk(stage(place) + lane * pitch(item.side), from + col, bytes, full(place));
    }
  }
};

}  // namespace reft::cuda
