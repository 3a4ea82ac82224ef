// Chooses and launches a forward kernel, by dtypes, d, alignment and the shape of the plan.
#pragma once

#include "forward_rows.cuh"
#include "forward_tiles.cuh"
#include "sizes.cuh"
#ifdef __CUDACC__
#include "forms.cuh"
#endif

namespace reft::cuda {

template <class H, class P, bool kNorm>
struct RowKernels {
  static constexpr int kSums = kRowSums;
  static constexpr int kWarps = kRowWarps, kBlocks = kRowBlocks;
  static constexpr auto shape = choose_shape<kRowWarps, kRowSums>;
  static constexpr auto one = forward_rows<H, P, true, true, kNorm>;
  static constexpr auto many = forward_rows<H, P, false, true, kNorm>;
  static constexpr auto odd = forward_rows<H, P, false, false, kNorm>;
};
template <class T, int kSlots, bool kNorm>
struct TileKernels {
  static constexpr int kSums = kSlots * kChunk;
  static constexpr int kWarps = kTileWarps, kBlocks = tile_blocks(kSlots, kNorm);
  static constexpr auto shape = choose_shape<kTileWarps, kSlots * kChunk>;
  static constexpr auto one = forward_tiles<T, kSlots, true, true, kNorm>;
  static constexpr auto many = forward_tiles<T, kSlots, false, true, kNorm>;
  static constexpr auto odd = forward_tiles<T, kSlots, false, false, kNorm>;
};

template <class Kernels>
const char* run(const ForwardCall& call, bool wide, cudaStream_t stream) {
  const Shape shape =
      Kernels::shape(call.d, call.tile_count, call.pool_rows, Kernels::kBlocks, wide);
  const int cluster = 1 << shape.shift;
  const Launch how{
      call.tile_count * cluster, 1, Kernels::kWarps * 32, cluster, shape.shared, stream};
  const auto kernel = !wide                                ? Kernels::odd
                      : call.d <= int64_t{cluster} * kUnit ? Kernels::one
                                                           : Kernels::many;
  return launch(kernel, how, call, shape.shift, static_cast<int>(shape.room));
}

// Whether everything can be read and written 16 bytes at a time.
inline bool all_aligned(const ForwardCall& call, bool norm) {
  const int64_t h = size_of(call.dtype), p = size_of(call.pool.dtype), d = call.d;
  const bool wide = aligned(call.h.data, call.h.stride, d, h) && aligned(call.pool.down, d, d, p) &&
                    aligned(call.pool.up, d, d, p);
  return wide && (!norm || (aligned(call.norm.weight, d, d, h) &&
                            aligned(call.norm.shift, d, d, h) && aligned(call.norm.out, d, d, h)));
}

// Few rows a tile, as in a decode step: eight rows at once, else sixteen. Only speed hangs on it.
inline bool few_rows(const ForwardCall& call) { return call.positions <= 4 * call.tile_count; }

template <class T, bool kNorm>
const char* run_tiles(const ForwardCall& call, bool wide, cudaStream_t stream) {
  if (few_rows(call)) return run<TileKernels<T, 8, kNorm>>(call, wide, stream);
  return run<TileKernels<T, 16, kNorm>>(call, wide, stream);
}

template <bool kNorm>
const char* run_forward(const ForwardCall& call, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0) return nullptr;
  const bool wide = all_aligned(call, kNorm);
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run<RowKernels<float, float, kNorm>>(call, wide, stream);
    case Dtype::bf16:
      return same ? run_tiles<Bf16, kNorm>(call, wide, stream)
                  : run<RowKernels<Bf16, float, kNorm>>(call, wide, stream);
    default:
      return same ? run_tiles<Half, kNorm>(call, wide, stream)
                  : run<RowKernels<Half, float, kNorm>>(call, wide, stream);
  }
}

#ifdef __CUDACC__
template <class Kernels>
std::string forms_of(const std::string& kernel, const char* h, const char* pool) {
  constexpr int kWarps = Kernels::kWarps, kSums = Kernels::kSums;
  const auto pointer = [](auto* function) { return reinterpret_cast<const void*>(function); };
  const auto form = [&](const char* name, const void* function, bool one, bool ones) {
    return shared_form<kWarps, kSums>(form_names(kernel.c_str(), name, h, pool), function, one,
                                      ones);
  };
  return form("one", pointer(Kernels::one), true, true) + ", " +
         form("many", pointer(Kernels::many), false, true) + ", " +
         form("odd", pointer(Kernels::odd), false, false);
}

template <bool kNorm>
std::string forward_forms() {
  const std::string end = kNorm ? " with the norm" : "";
  const std::string rows = "forward_rows" + end;
  const auto tiles = [&](auto type, const char* name) {
    using T = decltype(type);
    return forms_of<TileKernels<T, 8, kNorm>>("forward_tiles of 8" + end, name, name) + ", " +
           forms_of<TileKernels<T, 16, kNorm>>("forward_tiles of 16" + end, name, name) + ", " +
           forms_of<RowKernels<T, float, kNorm>>(rows, name, "float32");
  };
  return tiles(Bf16{}, "bfloat16") + ", " + tiles(Half{}, "float16") + ", " +
         forms_of<RowKernels<float, float, kNorm>>(rows, "float32", "float32");
}
#endif

}  // namespace reft::cuda
