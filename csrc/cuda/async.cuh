// Stores and copies that go on by themselves and count what has come on a barrier in shared memory:
// st.async into another block of the cluster, cp.async.bulk from global memory. From sm_90 on.
//
// A barrier counts arrivals and bytes. Its phase ends when all arrivals of this phase and all bytes
// that were announced have come; then the next one begins. Phases are waited for by their parity,
// so nobody may fall two phases behind.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__

namespace reft::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasAsync = true;

__device__ inline uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}
// The same place in another block of the cluster.
__device__ inline uint32_t address_in(const void* mine, int block) {
  uint32_t address = shared_address(mine);
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  return address;
}

__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// What this thread has initialised is there for others of the cluster, and for what copies by
// itself, once they have met.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces bytes of this phase. Some of them may have come already.
__device__ inline void arrive_announcing(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity. What was stored and copied lies in this block's
// own shared memory, so the block's scope is enough: the cluster's would throw away the whole of
// L1.
__device__ inline void wait_for(uint64_t* barrier, int parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// One float or four (then at 16 bytes) to the place in a block that has this address in this one.
// Its barrier counts their bytes.
__device__ inline void push_values(const float (&values)[1], float* mine, uint64_t* barrier,
                                   int block) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
          address_in(mine, block)),
      "f"(values[0]), "r"(address_in(barrier, block))
      : "memory");
}
__device__ inline void push_values(const float (&values)[4], float* mine, uint64_t* barrier,
                                   int block) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address_in(mine, block)),
      "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]),
      "r"(address_in(barrier, block))
      : "memory");
}
// `bytes` and both addresses are divisible by 16.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// The two halves of a meeting of the cluster: nobody goes on from the second before all have come
// to the first.
__device__ inline void come_to_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
constexpr bool kHasAsync = false;  // and nothing of this is called

__device__ inline void init_barrier(uint64_t*, int) {}
__device__ inline void publish_barriers() {}
__device__ inline void arrive(uint64_t*) {}
__device__ inline void arrive_announcing(uint64_t*, int) {}
__device__ inline void wait_for(uint64_t*, int) {}
template <int kValues>
__device__ void push_values(const float (&)[kValues], float*, uint64_t*, int) {}
__device__ inline void copy_bulk(void*, const void*, int, uint64_t*) {}
__device__ inline void come_to_cluster() {}
__device__ inline void wait_for_cluster() {}
#endif

__device__ inline void sync_warp() { __syncwarp(); }

}  // namespace reft::cuda
#else
#include "cuda_emulator_async.h"
#endif
