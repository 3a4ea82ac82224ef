// The emulator's csrc/cuda/async.cuh: barriers in shared memory that count arrivals and bytes, and
// stores and copies that arrive some time later, in any order, as the scheduler has it.
#pragma once

#include "cuda_emulator.h"

namespace reft::cuda {

constexpr bool kHasAsync = true;

// What lies in a barrier's 8 bytes.
struct Counter {
  int32_t bytes;  // announced and not come yet; less than none where some have come before
  uint8_t arrivals, of;
  uint8_t phase, mark;
};
static_assert(sizeof(Counter) == sizeof(uint64_t));
constexpr uint8_t kMade = 0xb5;  // not what shared memory is poisoned with

inline Counter* counter(uint64_t* barrier) {
  Counter* it = reinterpret_cast<Counter*>(barrier);
  if (it->mark != kMade) machine.fault = "a barrier was used that nobody has made";
  return it;
}
inline void close_phase(Counter* it) {
  if (it->arrivals == 0 && it->bytes == 0) {
    it->arrivals = it->of;
    ++it->phase;
    machine.idle = 0;
  }
}

inline void init_barrier(uint64_t* barrier, int arrivals) {
  const uint8_t count = static_cast<uint8_t>(arrivals);
  *reinterpret_cast<Counter*>(barrier) = {0, count, count, 0, kMade};
}
inline void publish_barriers() {}
inline void arrive_announcing(uint64_t* barrier, int bytes) {
  Counter* it = counter(barrier);
  if (it->arrivals == 0) machine.fault = "more came to a barrier than it counts";
  it->bytes += bytes;
  --it->arrivals;
  close_phase(it);
}
inline void arrive(uint64_t* barrier) { arrive_announcing(barrier, 0); }
inline void wait_for(uint64_t* barrier, int parity) {
  while (counter(barrier)->phase % 2 == parity && machine.fault == nullptr) leave();
}

// Puts something on its way: `bytes` to a place in a block, whose barrier counts them.
inline void send(const void* from, bool keep, void* mine, int bytes, uint64_t* barrier, int block) {
  Delivery it;
  it.block = block, it.bytes = bytes;
  it.to = reinterpret_cast<char*>(mine) - reinterpret_cast<char*>(shared_memory());
  it.barrier = reinterpret_cast<char*>(barrier) - reinterpret_cast<char*>(shared_memory());
  it.from = static_cast<const char*>(from);
  if (keep) it.kept.assign(it.from, it.from + bytes);
  if (it.to < 0 || it.to % (bytes < 16 ? 4 : 16) || it.to + bytes > machine.shared_bytes) {
    machine.fault = "a store beyond shared memory, or at an odd place";
    return;
  }
  machine.deliveries.push_back(it);
}
inline void deliver(size_t number) {
  Delivery it = machine.deliveries[number];
  machine.deliveries.erase(machine.deliveries.begin() + static_cast<std::ptrdiff_t>(number));
  if (machine.blocks[it.block].gone > 0) machine.fault = "a store into a block that has ended";
  char* const shared = machine.shared[it.block].get();
  memcpy(shared + it.to, it.kept.empty() ? it.from : it.kept.data(), it.bytes);
  Counter* at = counter(reinterpret_cast<uint64_t*>(shared + it.barrier));
  at->bytes -= it.bytes;
  close_phase(at);
  machine.idle = 0;
}

template <int kValues>
void push_values(const float (&values)[kValues], float* mine, uint64_t* barrier, int block) {
  send(values, true, mine, static_cast<int>(sizeof(values)), barrier, block);
}
inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
    machine.fault = "an unaligned copy";
  send(from, false, to, bytes, barrier, machine.now->in_cluster);
}

inline void come_to_cluster() {
  machine.now->came = machine.cluster.generation;
  come(machine.cluster);
}
inline void wait_for_cluster() {
  while (machine.cluster.generation == machine.now->came && machine.fault == nullptr) leave();
}
inline void sync_warp() { meet(warp_group()); }

}  // namespace reft::cuda
