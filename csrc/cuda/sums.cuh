// Products over d, split over threads, warps, units and blocks, and summed in one fixed order.
//
// A unit is 512 columns of h. The blocks of a cluster share the units of a tile: block b takes
// units b, b + size, … A unit's warps are added in order, then the units are. So the bits of a sum
// depend on d and the dtypes, never on the cluster's size or on what else is in the batch. Products
// are written as fmaf, and the compiler fuses none by itself (--fmad=false).
#pragma once

#include "device.cuh"

namespace reft::cuda {

constexpr int kUnit = 512;
constexpr int kChunk = 8;  // pool rows at a time
constexpr int kLargestCluster = 8;

// Widths, strides and rows fit in 32 bits (intervene.h), their products do not.
template <class Call>
__device__ int width_of(const Call& call) {
  return static_cast<int>(call.d);
}
// Where a row begins, in elements.
__device__ inline int64_t offset(int row, int64_t stride) {
  return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(row)} * static_cast<uint32_t>(stride));
}

// Eight columns of a row, as they lie in memory.
template <class T>
struct Eight {
  static constexpr int kWords = 2 * sizeof(T);
  union {
    uint32_t words[kWords];
    T values[8];
  };

  // `left` columns are there from `from` on, those beyond are 0. kAligned: `from` is divisible by
  // 16 bytes and `left` by 8.
  template <bool kAligned>
  __device__ void load(const T* from, int left, bool live) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if (kAligned) {
      if (live && left > 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) load16(from + i * 4 / sizeof(T), words + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (live && i < left) values[i] = from[i];
      }
    }
  }

  template <bool kAligned>
  __device__ void store(T* to, int left) const {
    if (kAligned) {
      if (left > 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) store16(words + i, to + i * 4 / sizeof(T));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) to[i] = values[i];
      }
    }
  }

  __device__ float operator[](int i) const { return to_float(values[i]); }
};

template <class T>
__device__ float dot(const Eight<T>& a, const float (&b)[8], float sum) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// Sums N values over the lanes of a warp: in lane L the total of value L / (32 / N). The tree over
// the lanes is the same for any N.
template <int kOffset, int N, int M>
__device__ void warp_total_step(float (&values)[M]) {
  if constexpr (N > 1) {
    const bool upper = (threadIdx.x & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? values[i] : values[i + N / 2];
      const float kept = upper ? values[i + N / 2] : values[i];
      values[i] = kept + shuffle_xor(sent, kOffset);
    }
  } else {
    values[0] += shuffle_xor(values[0], kOffset);
  }
  if constexpr (kOffset > 1) warp_total_step<kOffset / 2, (N > 1 ? N / 2 : 1)>(values);
}
template <int N>
__device__ float warp_total(float (&values)[N]) {
  warp_total_step<16, N>(values);
  return values[0];
}

// A block's share of a tile's units, and the shared memory in which sums meet:
//
//     [group][kWarps][N]  what each warp has of the units that are open
//     [2][share][N]       sums of this block's units, in two sets
//     values, whose use is the kernel's
template <int kWarps, int N, bool kOne = false>
struct Sums {
  // Units that are closed at once: as many as give each thread one value to add up. kOne: of one
  // unit a block.
  static constexpr int kThreads = kWarps * 32, kGroup = kOne ? 1 : kThreads / N;
  static_assert(N <= kThreads, "a thread adds up one value");

  int units, block, blocks, shift;
  float* memory;

  // The cluster has 2^shift blocks.
  __device__ Sums(int64_t d, int shift)
      : units((static_cast<int>(d) + kUnit - 1) / kUnit),
        block(static_cast<int>(blockIdx.x) & ((1 << shift) - 1)),
        blocks(1 << shift),
        shift(shift),
        memory(shared_memory()) {}

  __device__ int share() const { return kOne ? 1 : (units + blocks - 1) >> shift; }
  // A unit's number among those of its block.
  __device__ int number(int unit) const { return kOne ? 0 : unit >> shift; }
  // Where warp w leaves its sums of a unit, until that is closed.
  __device__ float* warp(int unit, int w) const {
    return memory + (number(unit) % kGroup * kWarps + w) * N;
  }
  // Two sets, taken in turns: other blocks may still read one while the other is written.
  __device__ float* unit(int u, int turn) const {
    return memory + (kGroup * kWarps + (turn % 2) * share() + number(u)) * N;
  }
  // Room for what a kernel makes of the sums.
  __device__ float* values() const { return memory + (kGroup * kWarps + 2 * share()) * N; }

  // To be called after each unit, in turn. Where the group is full or this was the block's last
  // unit, adds up the warps' first kCount values of each unit of the group. One meeting of the
  // block serves them all, and after its last unit it meets in what follows (`sync_cluster`) only.
  template <int kCount = N>
  __device__ void close(int u, int turn) const {
    const int place = number(u) % kGroup;
    const bool last = kOne || u + blocks >= units;
    if (place + 1 < kGroup && !last) return;
    sync_block();
    const int j = static_cast<int>(threadIdx.x) / kCount, i = threadIdx.x % kCount;
    if (j <= place) {
      const int mine = u - (place - j) * blocks;
      float sum = warp(mine, 0)[i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += warp(mine, w)[i];
      unit(mine, turn)[i] = sum;
    }
    if (!last) sync_block();  // the warps' memory is free again
  }

  // Brings into L2 what this block will read of eight pool rows [·, width] from `begin` on, where
  // it has several units and reads them one by one: D of all but the first, and U.
  template <class P>
  __device__ void prefetch(const P* down, const P* up, int begin, int rank, int width) const {
    const int lane = threadIdx.x, r = begin + lane % kChunk;
    if (lane >= 2 * kChunk || r >= rank) return;
    const P* from = (lane < kChunk ? down : up) + offset(r, width);
    for (int u = block + (lane < kChunk ? blocks : 0); u < units; u += blocks) {
      const int left = width - u * kUnit;
      prefetch_l2(from + u * kUnit, (left < kUnit ? left : kUnit) * static_cast<int>(sizeof(P)));
    }
  }

  // To be called after the close of the last unit: the sums of all blocks are there then.
  template <int kCount = N>
  __device__ void meet(int) const {
    sync_cluster(blocks);
  }

  // The sum of value i over all units, once the cluster has met.
  __device__ float total(int i, int turn) const {
    return in_order([&](int u) { return load_cluster(unit(u, turn) + i, u & (blocks - 1)); });
  }

  // A block's beginning; then, where it has something to do, before it closes a unit; and its end.
  static __device__ void begin() {}
  static __device__ void join() {}
  static __device__ void leave(int shift) { leave_cluster(1 << shift); }  // others may still read
  // Whether a block that has joined may end at once.
  static __device__ bool idle(int64_t, int) { return false; }

 protected:
  // Σ of(unit). Several loads are under way at a time: one from another block takes a good part of
  // a microsecond.
  template <class Of>
  __device__ float in_order(Of of) const {
    float sum = 0.0f;
    for (int begin = 0; begin < (kOne ? 1 : units); begin += kLargestCluster) {
      float parts[kLargestCluster];
#pragma unroll
      for (int j = 0; j < kLargestCluster; ++j) {
        parts[j] = begin + j < units ? of(begin + j) : -0.0f;
      }
#pragma unroll
      for (int j = 0; j < kLargestCluster; ++j) sum = begin + j == 0 ? parts[0] : sum + parts[j];
    }
    return sum;
  }
};

// The tile of a block, and its range: rank 0 where it has nothing to do (no rows, or segment −1).
// All words of a table are asked for at once, and whatever else the caller asks for before it looks
// at the range is under way with it.
struct Work {
  Tile tile;
  Span span;

  __device__ Work(const Plan& plan, int64_t number) {
    const Tile* at = plan.tiles + number;
    tile = *at;
    ask(tile.segment), ask(tile.start), ask(tile.count);
    const bool idle = tile.count <= 0 || tile.segment < 0;
    // What is there in any case takes the place of a range that is not.
    const Span* range = idle ? reinterpret_cast<const Span*>(at) : plan.spans + tile.segment;
    span = *range;
    ask(span.first), ask(span.rank);
    if (idle || span.rank < 0) span = Span{0, 0};
  }
};

// Segments [begin, end) of a plan, among which are all that `wanted`(its range) holds for; none
// where begin is not less. Each warp looks at all ranges, a lane at every 32nd of them.
struct Segments {
  int begin, end = 0;

  template <class Wanted>
  __device__ Segments(const Plan& plan, int64_t count, Wanted wanted)
      : begin(static_cast<int>(count)) {
    for (int s = static_cast<int>(threadIdx.x) % 32; s < count; s += 32) {
      if (!wanted(plan.spans[s])) continue;
      begin = s < begin ? s : begin;
      end = s + 1;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const int other_begin = shuffle_xor(begin, lanes), other_end = shuffle_xor(end, lanes);
      begin = other_begin < begin ? other_begin : begin;
      end = other_end > end ? other_end : end;
    }
  }
};

__device__ inline int padded(int rank) { return (rank + kChunk - 1) / kChunk * kChunk; }

// φ(D h + c) of this many pool rows of 16 rows of h fit in shared memory, and of kMostAtOnce of one
// row. A range beyond that is done in parts.
constexpr int kUsualRank = 256, kMostAtOnce = 16 * kUsualRank;

// Rows of h, of `most`, whose values for all pool rows fit in `room` floats at once.
__device__ inline int rows_at_once(int most, int rank, int room) {
  return padded(rank) <= room / most ? most : room / padded(rank);
}

// Pool rows in a part, where beside their values the columns of a block's units must fit.
__device__ inline int part_of(int room, int share) {
  return (room - share * kUnit) / kChunk * kChunk;
}

}  // namespace reft::cuda
