// Sizes of a launch: blocks, shared memory, alignment. For the host.
#pragma once

#include "sums.cuh"

namespace reft::cuda {

// φ(D h + c) of at least this many pool rows of 16 rows of h fit in shared memory.
constexpr int64_t kUsualRank = 256;

template <int kWarps, int N>
int64_t sums_bytes(int64_t d, int shift, int64_t values) {
  const int64_t units = (d + kUnit - 1) / kUnit, share = (units + (1 << shift) - 1) >> shift;
  return static_cast<int64_t>(sizeof(float)) * ((kWarps + 2 * share) * N + values);
}

// log2 of the blocks that share a tile's units: 0 where the device has no clusters. Only speed
// depends on it. With a unit a block a tile is done soonest. Where tiles times blocks are more than
// the chip holds at once (`resident` on each multiprocessor), fewer blocks with several units each
// save the time that a block only waits: its chain of first loads, the meeting of the cluster and
// its end take about as long as kFixedUnits units.
constexpr int64_t kFixedUnits = 4;
constexpr int64_t kMostUnits = 16;  // a block's, by choice: each takes shared memory

inline int cluster_shift(int64_t d, int64_t tiles, int resident) {
  const Chip chip = current_chip();
  const int64_t units = (d + kUnit - 1) / kUnit;
  const int64_t slots = int64_t{chip.multiprocessors} * resident;
  int most = 0;
  while (chip.clusters && (1 << most) < kLargestCluster && (1 << most) < units) ++most;
  int best = most;
  int64_t least = 0;
  for (int shift = most; shift >= 0; --shift) {
    const int64_t share = (units + (1 << shift) - 1) >> shift;
    if (shift < most && share > kMostUnits) break;
    const int64_t waves = ((tiles << shift) + slots - 1) / slots;
    const int64_t cost = waves * (kFixedUnits + share);
    if (shift == most || cost < least) best = shift, least = cost;
  }
  return best;
}

// Floats for the values of as many rows as fit: 16 of the usual rank, and one of any.
inline int64_t value_room(int64_t pool_rows) {
  const int64_t usual = kTile * kUsualRank;
  const int64_t most = (pool_rows + kChunk - 1) / kChunk * kChunk;
  return most < usual ? usual : most < kMaxRank ? most : kMaxRank;
}

// Whether rows of d elements at `data` can be read 16 bytes at a time.
inline bool aligned(const void* data, int64_t stride, int64_t d, int64_t element) {
  return d % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace reft::cuda
