// What the kernels need of the machine: numbers, 16-byte loads, tensor cores, clusters.
//
// Without nvcc this is the emulator of tests/support/cuda_emulator.h, which runs the same kernels
// on a CPU, a fiber for each thread.
#pragma once

#include <stdint.h>

#include "intervene.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace reft::cuda {

__device__ inline float bits_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_bits(float x) { return __float_as_uint(x); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ inline void round_to(float x, float* out) { *out = x; }
__device__ inline void round_to(float x, Bf16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void round_to(float x, Half* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

// 16 bytes at an address divisible by 16.
__device__ inline void load16(const void* from, uint32_t* to) {
  const uint4 v = *static_cast<const uint4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
// Said in PTX, for the compiler likes to store the words one by one.
__device__ inline void store16(const uint32_t* from, void* to) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// Has a word asked for before this point, not where it is first needed: left to itself, the
// compiler asks for the second word of a table when the first has shown that it is needed. Nothing
// waits here.
__device__ inline void ask(int32_t word) { asm volatile("" ::"r"(word)); }
// x, of which the compiler no longer knows where it comes from: what is computed of it inside a
// loop is not kept in registers from before the loop.
__device__ inline int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// One word, −1 where it is not wanted. Asked for where this stands, not where it is needed.
__device__ inline int32_t load_word_if(bool wanted, const int32_t* from) {
  int32_t word;
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %2, 0;\n mov.b32 %0, -1;\n @p ld.global.b32 %0, [%1];\n}"
      : "=r"(word)
      : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(wanted)));
  return word;
}

// Starts to bring memory into L2: `bytes` and the address divisible by 16.
__device__ inline void prefetch_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
               "r"(bytes));
#endif
}

__device__ inline float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}
__device__ inline int shuffle_xor(int x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}
__device__ inline int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Products of tensor cores need all lanes of a warp. They are volatile, so that the compiler moves
// none into a branch that some lanes do not take.
//
// c [16, 8] += a [16, 16] b [16, 8], a and b of 16-bit elements, sums in float32. Lane 4 g + t
// holds a: rows g and g + 8 of columns {2 t, 2 t + 1}, then of {2 t + 8, 2 t + 9}; b: rows {2 t, 2
// t + 1}, then {2 t + 8, 2 t + 9} of column g; c: columns {2 t, 2 t + 1} of row g, then of row g
// + 8.
__device__ inline void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] b [8, 8] in TF32 (float32 whose last 13 bits are not looked at). Lane
// 4 g + t holds a: rows g and g + 8 of column t, then of column t + 4; b: rows t and t + 4 of
// column g; c as above.
__device__ inline void mma8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(float_bits(a[0])), "r"(float_bits(a[1])), "r"(float_bits(a[2])), "r"(float_bits(a[3])),
        "r"(float_bits(b0)), "r"(float_bits(b1)));
}

__device__ inline float* shared_memory() {
  extern __shared__ float4 shared_bytes[];
  return reinterpret_cast<float*>(shared_bytes);
}

__device__ inline void sync_block() { __syncthreads(); }

// All threads of all blocks of the cluster; what they wrote to shared memory before is visible
// after.
__device__ inline void sync_cluster(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// No block of the cluster goes on, or ends, before all have come here. Nothing is made visible.
__device__ inline void leave_cluster(int blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
    asm volatile("barrier.cluster.wait.aligned;");
  }
#endif
}

// A float of a block's shared memory, at the address that it has in this block. A block by itself
// is a cluster of one.
__device__ inline float load_cluster(const float* mine, int block) {
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
#else
  return *mine;
#endif
}

struct Launch {
  int64_t blocks;
  int64_t columns;  // of blocks, the grid's y
  int threads;
  int cluster;
  int64_t shared;  // bytes
  cudaStream_t stream;
};

struct Chip {
  int multiprocessors;
  int shared;     // bytes of shared memory in each
  bool clusters;  // of thread blocks
};

// What the library was built for, in rising order. Code for an older chip that runs on a newer one
// has no meeting of a cluster in it.
constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};
constexpr bool kBuiltWithClusters = kBuiltFor[sizeof(kBuiltFor) / sizeof(int) - 1] >= 900;

inline Chip current_chip() {
  int device = 0, major = 0;
  Chip chip{1, 48 * 1024, false};
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&chip.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&chip.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    chip.clusters = kBuiltWithClusters && major >= 9;
  }
  return chip;
}

// While this lives, the calling thread may do what the capture of a graph forbids by default. A
// kernel's code is loaded when it is first asked for, which is not recorded in a graph and waits
// for nothing, but counts as forbidden.
class LoadsInCapture {
 public:
  LoadsInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~LoadsInCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  LoadsInCapture(const LoadsInCapture&) = delete;
  LoadsInCapture& operator=(const LoadsInCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

template <class... Arguments>
const char* launch(void (*kernel)(Arguments...), const Launch& how, Arguments... arguments) {
  const LoadsInCapture loads;
  cudaError_t error = cudaSuccess;
  if (how.shared > 48 * 1024) {
    // All that a block may have here, whatever this launch needs: the attribute is the kernel's
    // own, and another thread's launch, with less, must not take it away before this one.
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess && how.shared > most) {
      return "d is too large for the shared memory of a block on this GPU";
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(how.blocks), static_cast<unsigned>(how.columns));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = static_cast<size_t>(how.shared);
    config.stream = how.stream;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, so it must not be found again by a later launch
  return cudaGetErrorString(error);
}

}  // namespace reft::cuda
#else
#include "cuda_emulator.h"
#endif
