// What the GPU makes of each kernel's resources, for those who tune it: registers, and how many
// blocks and clusters it holds at once. Asked of the driver, so only where there is a GPU.
#pragma once

#include <string>
#include <type_traits>

#include "sizes.cuh"

namespace reft::cuda {

// d and pool rows that shared memory is computed for.
constexpr int64_t kFormWidth = 4096, kFormPool = 4096;

inline std::string quoted(const char* name, const std::string& value) {
  return std::string("\"") + name + "\": " + value;
}
template <class T>
const char* dtype_name() {
  return sizeof(T) == 4 ? "float32" : std::is_same_v<T, Bf16> ? "bfloat16" : "float16";
}

// One kernel as a JSON object, with an entry for each cluster that it is launched in at kFormWidth.
// `shared`: bytes of a block in a cluster of 2^shift blocks, negative where it has none such.
inline std::string form_text(const std::string& names, const void* kernel, int threads,
                             const int64_t (&shared)[4]) {
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  std::string launches;
  for (int shift = 0; shift < 4; ++shift) {
    if (shared[shift] < 0) continue;
    int blocks = 0, clusters = 0;
    const int bytes = static_cast<int>(shared[shift]);
    if (error == cudaSuccess && bytes > 48 * 1024) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    }
    if (error == cudaSuccess && shift > 0) {
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = 1u << shift;
      cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(1u << shift);
      config.blockDim = dim3(static_cast<unsigned>(threads));
      config.dynamicSmemBytes = static_cast<size_t>(bytes);
      config.attrs = &cluster;
      config.numAttrs = 1;
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    }
    launches += (launches.empty() ? "{" : ", {") + quoted("cluster", std::to_string(1 << shift)) +
                ", " + quoted("shared_bytes", std::to_string(bytes)) + ", " +
                quoted("blocks_per_multiprocessor", std::to_string(blocks)) +
                (shift > 0 ? ", " + quoted("clusters_at_once", std::to_string(clusters)) : "") +
                "}";
  }
  std::string text = "{" + names + ", " + quoted("threads", std::to_string(threads)) + ", " +
                     quoted("registers", std::to_string(attributes.numRegs)) + ", " +
                     quoted("local_bytes", std::to_string(attributes.localSizeBytes)) + ", " +
                     quoted("launches", "[" + launches + "]");
  if (error != cudaSuccess) {
    cudaGetLastError();
    text += ", " + quoted("error", std::string("\"") + cudaGetErrorString(error) + "\"");
  }
  return text + "}";
}

inline std::string form_names(const char* kernel, const char* form, const char* h,
                              const char* pool) {
  const auto text = [](const char* value) { return std::string("\"") + value + "\""; };
  return quoted("kernel", text(kernel)) + ", " + quoted("form", text(form)) + ", " +
         quoted("h", text(h)) + ", " + quoted("pool", text(pool));
}

// The forms of a kernel that shares the units of a tile. kOne: the one for a unit a block.
template <int kWarps, int N>
std::string shared_form(const std::string& names, const void* kernel, bool one, bool ones) {
  int64_t shared[4];
  const Chip chip = current_chip();
  for (int shift = 0; shift < 4; ++shift) {
    const bool alone = (kFormWidth >> shift) <= kUnit;
    const bool launched = (shift == 0 || chip.clusters) && (!ones || one == alone);
    shared[shift] =
        launched ? shape_with<kWarps, N>(kFormWidth, kFormPool, shift, ones).shared : -1;
  }
  return form_text(names, kernel, kWarps * 32, shared);
}

}  // namespace reft::cuda
