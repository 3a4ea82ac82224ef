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
// φ(D h + c) of at least this many pool rows of 16 rows of h fit in shared memory.
constexpr int64_t kUsualRank = 256;

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
  __device__ void load(const T* from, int64_t left, bool live) {
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
  __device__ void store(T* to, int64_t left) const {
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
  int units, block, blocks;
  float* memory;

  __device__ Sums(int64_t d, int cluster)
      : units(static_cast<int>((d + kUnit - 1) / kUnit)),
        block(static_cast<int>(blockIdx.x % cluster)),
        blocks(cluster),
        memory(shared_memory()) {}

  __device__ int share() const { return (units + blocks - 1) / blocks; }
  __device__ float* warp(int w) const { return memory + w * N; }
  // Two sets, taken in turns: other blocks may still read one while the other is written.
  __device__ float* unit(int u, int turn) const {
    return memory + (kWarps + (turn % 2) * share() + u / blocks) * N;
  }
  // Room for what a kernel makes of the sums.
  __device__ float* values() const { return memory + (kWarps + 2 * share()) * N; }

  // Adds up the warps' values of unit u. The warps' memory is free afterwards.
  __device__ void close_unit(int u, int turn) const {
    sync_block();
    for (int i = threadIdx.x; i < N; i += kWarps * 32) {
      float sum = warp(0)[i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) sum += warp(w)[i];
      unit(u, turn)[i] = sum;
    }
    sync_block();
  }

  // The sum of value i over all units, once the cluster has met after close_unit.
  __device__ float total(int i, int turn) const {
    float sum = load_cluster(unit(0, turn) + i, 0);
    for (int u = 1; u < units; ++u) {
      sum += load_cluster(unit(u, turn) + i, u % blocks);
    }
    return sum;
  }
};

template <int kWarps, int N>
int64_t sums_bytes(int64_t d, int cluster, int64_t values) {
  const int64_t units = (d + kUnit - 1) / kUnit, share = (units + cluster - 1) / cluster;
  return static_cast<int64_t>(sizeof(float)) * ((kWarps + 2 * share) * N + values);
}

// Blocks for the units of d: a power of two, 1 where the device has no clusters.
inline int cluster_size(int64_t d) {
  int size = 1;
  if (has_clusters()) {
    while (size < kLargestCluster && size * kUnit < d) size *= 2;
  }
  return size;
}

// Floats for the values of as many rows as fit: 16 of the usual rank, and one of any.
inline int64_t value_room(int64_t pool_rows) {
  const int64_t usual = kTile * kUsualRank;
  const int64_t most = (pool_rows + kChunk - 1) / kChunk * kChunk;
  return most < usual ? usual : most < kMaxRank ? most : kMaxRank;
}

__device__ inline int padded(int rank) { return (rank + kChunk - 1) / kChunk * kChunk; }

// Whether rows of d elements at `data` can be read 16 bytes at a time.
inline bool aligned(const void* data, int64_t stride, int64_t d, int64_t element) {
  return d % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace reft::cuda
