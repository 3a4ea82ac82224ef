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

// A block's share of a tile's units, and the shared memory in which sums meet.
template <int kWarps, int N>
struct Sums {
  int units, block, blocks, shift;
  float* memory;

  // The cluster has 2^shift blocks.
  __device__ Sums(int64_t d, int shift)
      : units((static_cast<int>(d) + kUnit - 1) / kUnit),
        block(static_cast<int>(blockIdx.x) & ((1 << shift) - 1)),
        blocks(1 << shift),
        shift(shift),
        memory(shared_memory()) {}

  __device__ int share() const { return (units + blocks - 1) >> shift; }
  __device__ float* warp(int w) const { return memory + w * N; }
  // Two sets, taken in turns: other blocks may still read one while the other is written.
  __device__ float* unit(int u, int turn) const {
    return memory + (kWarps + (turn % 2) * share() + (u >> shift)) * N;
  }
  // Room for what a kernel makes of the sums.
  __device__ float* values() const { return memory + (kWarps + 2 * share()) * N; }

  // Adds up the warps' first kCount values of unit u. The warps' memory is free afterwards.
  template <int kCount = N>
  __device__ void close_unit(int u, int turn) const {
    static_assert(kCount <= kWarps * 32, "a thread adds up one value");
    sync_block();
    if (threadIdx.x < kCount) {
      float sum = warp(0)[threadIdx.x];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += warp(w)[threadIdx.x];
      unit(u, turn)[threadIdx.x] = sum;
    }
    sync_block();
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

  // The sum of value i over all units, once the cluster has met after close_unit. Several loads are
  // under way at a time: one from another block takes a good part of a microsecond.
  __device__ float total(int i, int turn) const {
    float sum = 0.0f;
    for (int begin = 0; begin < units; begin += kLargestCluster) {
      float parts[kLargestCluster];
#pragma unroll
      for (int j = 0; j < kLargestCluster; ++j) {
        const int u = begin + j;
        parts[j] = u < units ? load_cluster(unit(u, turn) + i, u & (blocks - 1)) : -0.0f;
      }
#pragma unroll
      for (int j = 0; j < kLargestCluster; ++j) sum = begin + j == 0 ? parts[0] : sum + parts[j];
    }
    return sum;
  }
};

// A tile of segment −1 edits nothing.
__device__ inline Span range_of(const Plan& plan, const Tile& tile) {
  return tile.segment < 0 ? Span{0, 0} : plan.spans[tile.segment];
}

__device__ inline int padded(int rank) { return (rank + kChunk - 1) / kChunk * kChunk; }

}  // namespace reft::cuda
