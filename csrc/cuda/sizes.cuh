// Sizes of a launch: blocks, shared memory, alignment. For the host.
#pragma once

#include "sums.cuh"

namespace reft::cuda {

// Pool rows in a part, at least, where a range is done in parts.
constexpr int64_t kLeastPart = 512;

// Floats for the values of rows. The host does not know a range's rank, only that the pool has so
// many rows; a range of more than kMostAtOnce is done in parts, beside which the columns of a
// block's units must fit. So shared memory does not grow with the pool beyond what d asks for.
inline int64_t value_room(int64_t pool_rows, int64_t share) {
  const int64_t in_parts = share * kUnit + kLeastPart;
  return pool_rows <= kMostAtOnce || in_parts <= kMostAtOnce ? kMostAtOnce : in_parts;
}

// A launch of a kernel whose blocks have kWarps warps and meet in sums of N values. `ones`: there
// is a form of it for one unit a block.
struct Shape {
  int shift;       // log2 of the blocks that share a tile's units
  int64_t room;    // floats for values
  int64_t shared;  // bytes of a block
};

template <int kWarps, int N>
Shape shape_with(int64_t d, int64_t pool_rows, int shift, bool ones) {
  const int64_t units = (d + kUnit - 1) / kUnit, share = (units + (1 << shift) - 1) >> shift;
  const int64_t group = ones && share == 1 ? 1 : Sums<kWarps, N>::kGroup;
  const int64_t room = value_room(pool_rows, share);
  const int64_t floats = (kWarps * group + 2 * share) * N + room;
  return {shift, room, static_cast<int64_t>(sizeof(float)) * floats};
}

// Blocks of a cluster: one where the device has no clusters. Only speed depends on it. With a unit
// a block a tile is done soonest. Where tiles times blocks are more than the chip holds at once, as
// many on each multiprocessor as find registers (`resident`) and shared memory, fewer blocks with
// several units each save the time that a block only waits: its chain of first loads, the meeting
// of the cluster and its end take about as long as kFixedUnits units.
constexpr int64_t kFixedUnits = 4;
constexpr int64_t kMostUnits = 16;   // a block's, by choice: each takes shared memory
constexpr int64_t kReserved = 1024;  // bytes that the system takes of each block's shared memory

template <int kWarps, int N>
Shape choose_shape(int64_t d, int64_t tiles, int64_t pool_rows, int64_t resident, bool ones) {
  const Chip chip = current_chip();
  const int64_t units = (d + kUnit - 1) / kUnit;
  int most = 0;
  while (chip.clusters && (1 << most) < kLargestCluster && (1 << most) < units) ++most;
  Shape best = shape_with<kWarps, N>(d, pool_rows, most, ones);
  int64_t least = 0;
  for (int shift = most; shift >= 0; --shift) {
    const int64_t share = (units + (1 << shift) - 1) >> shift;
    if (shift < most && share > kMostUnits) break;
    const Shape shape = shape_with<kWarps, N>(d, pool_rows, shift, ones);
    const int64_t fit = chip.shared / (shape.shared + kReserved);
    const int64_t slots = chip.multiprocessors * (fit < 1 ? 1 : fit < resident ? fit : resident);
    const int64_t waves = ((tiles << shift) + slots - 1) / slots;
    const int64_t cost = waves * (kFixedUnits + share);
    if (shift == most || cost < least) best = shape, least = cost;
  }
  return best;
}

// Whether rows of d elements at `data` can be read 16 bytes at a time.
inline bool aligned(const void* data, int64_t stride, int64_t d, int64_t element) {
  return d % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace reft::cuda
