// Sums that are pushed: where a unit is closed, its sums go into the shared memory of every block
// of the cluster, which waits for its own copy of all of them. In place of a barrier of the cluster
// and reads from the other blocks (sums.cuh); the order of a sum, and so its bits, is the same.
#pragma once

#include "async.cuh"
#include "sums.cuh"

namespace reft::cuda {

// Two sets of sums, each with a barrier, in turns. A block pushes the sums of turn t + 1 after it
// has read those of turn t, and nobody pushes those of turn t + 2 before all of turn t + 1 have
// come to it. So what is written over was read by then. And a block may end when its last sums have
// come: it was sent no others. A block without a unit would push none, and nobody would wait for
// it; it is sent none, and ends once the cluster has met.
template <int kWarps, int N, bool kOne>
struct PushedSums : Sums<kWarps, N, kOne> {
  using Base = Sums<kWarps, N, kOne>;
  using Base::block, Base::blocks, Base::kGroup, Base::kThreads, Base::memory, Base::number,
      Base::units, Base::warp;

  static constexpr int kBarriers = 4;  // floats that two barriers take

  __device__ PushedSums(int64_t d, int shift) : Base(d, shift) { memory += kBarriers; }

  // Makes the block's barriers and tells the other blocks that it is there; waits for nothing.
  static __device__ void begin() {
    if (threadIdx.x == 0) {
      for (int set = 0; set < 2; ++set) init_barrier(barrier(set), 1);
      publish_barriers();
    }
    come_to_cluster();
  }
  // Now the barriers of all blocks are there.
  static __device__ void join() { wait_for_cluster(); }
  // The last sums have come, so nobody will push others into this block.
  static __device__ void leave(int) {}
  static __device__ bool idle(int64_t d, int shift) {
    return (static_cast<int>(blockIdx.x) & ((1 << shift) - 1)) * int64_t{kUnit} >= d;
  }

  // In every block all units have a place. Where a block has one, they are no more than blocks.
  __device__ int places() const { return kOne ? kLargestCluster : units; }
  // Blocks that have a unit.
  __device__ int busy() const { return units < blocks ? units : blocks; }
  __device__ float* unit(int u, int turn) const {
    return memory + (kGroup * kWarps + (turn % 2) * places() + u) * N;
  }
  __device__ float* values() const { return memory + (kGroup * kWarps + 2 * places()) * N; }

  // As in Sums. Where a block has one unit, a thread adds up four values for one of the blocks that
  // they go to; else one value for all of them.
  template <int kCount = N>
  __device__ void close(int u, int turn) const {
    const int place = number(u) % kGroup;
    const bool last = kOne || u + blocks >= units;
    if (place + 1 < kGroup && !last) return;
    sync_block();
    if constexpr (kOne) {
      constexpr int kQuads = kCount / 4;
      static_assert(kCount % 4 == 0 && kQuads * kLargestCluster <= kThreads);
      const int i = threadIdx.x;
      if (i < kQuads * busy()) push<4>(u, turn, i % kQuads * 4, i / kQuads);
    } else {
      const int j = static_cast<int>(threadIdx.x) / kCount, i = threadIdx.x % kCount;
      if (j <= place) {
        const int mine = u - (place - j) * blocks;
#pragma unroll 1
        for (int to = 0; to < busy(); ++to) push<1>(mine, turn, i, to);
      }
      if (!last) sync_block();  // the warps' memory is free again
    }
  }

  // Waits for the first kCount sums of all units of this turn. Then all threads of all blocks have
  // come to the close of their last unit. The block's own have pushed, too: the warps' memory is
  // free again, which the block's own sums do not tell (it may yet be read for other blocks), and
  // nobody is left waiting for a turn before this one. That barrier stands beside what is on its
  // way.
  template <int kCount = N>
  __device__ void meet(int turn) const {
    sync_block();
    const int bytes = units * kCount * static_cast<int>(sizeof(float));
    if (threadIdx.x == 0) arrive_announcing(barrier(turn % 2), bytes);
    wait_for(barrier(turn % 2), turn / 2 % 2);
  }

  __device__ float total(int i, int turn) const {
    return this->in_order([&](int u) { return unit(u, turn)[i]; });
  }

 private:
  // Adds up values i, … of a unit and sends them to a block.
  template <int kValues>
  __device__ void push(int u, int turn, int i, int to) const {
    float sum[kValues];
#pragma unroll
    for (int c = 0; c < kValues; ++c) sum[c] = warp(u, 0)[i + c];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
#pragma unroll
      for (int c = 0; c < kValues; ++c) sum[c] += warp(u, w)[i + c];
    }
    push_values(sum, unit(u, turn) + i, barrier(turn % 2), to);
  }
  static __device__ uint64_t* barrier(int set) {
    return reinterpret_cast<uint64_t*>(shared_memory()) + set;
  }
};

}  // namespace reft::cuda
