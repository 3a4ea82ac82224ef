// Chooses and launches a forward kernel, by dtypes, d and alignment.
#include "forward_rows.cuh"
#include "forward_tiles.cuh"

namespace reft::cuda {
namespace {

template <class Kernels>
const char* run(const ForwardCall& call, bool wide, int64_t (*bytes)(int64_t, int, int64_t),
                int warps, cudaStream_t stream) {
  const int cluster = cluster_size(call.d);
  const int64_t room = value_room(call.pool_rows);
  const Launch how{call.tile_count * cluster,    1,     warps * 32, cluster,
                   bytes(call.d, cluster, room), stream};
  const int extra[2] = {cluster, static_cast<int>(room)};
  if (!wide) return launch(Kernels::odd, how, call, extra[0], extra[1]);
  if (call.d <= int64_t{cluster} * kUnit)
    return launch(Kernels::one, how, call, extra[0], extra[1]);
  return launch(Kernels::many, how, call, extra[0], extra[1]);
}

template <class H, class P>
struct Rows {
  static constexpr auto one = forward_rows<H, P, true, true>;
  static constexpr auto many = forward_rows<H, P, false, true>;
  static constexpr auto odd = forward_rows<H, P, false, false>;
};
template <class T>
struct Tiles {
  static constexpr auto one = forward_tiles<T, true, true>;
  static constexpr auto many = forward_tiles<T, false, true>;
  static constexpr auto odd = forward_tiles<T, false, false>;
};

}  // namespace

const char* launch_forward(const ForwardCall& call, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0 || call.pool_rows == 0) return nullptr;
  const bool wide = aligned(call.h.data, call.h.stride, call.d, size_of(call.dtype)) &&
                    aligned(call.pool.down, call.d, call.d, size_of(call.pool.dtype)) &&
                    aligned(call.pool.up, call.d, call.d, size_of(call.pool.dtype));
  const auto rows = sums_bytes<kRowWarps, kRowSums>;
  const auto tiles = sums_bytes<kTileWarps, kTileSums>;
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run<Rows<float, float>>(call, wide, rows, kRowWarps, stream);
    case Dtype::bf16:
      return same ? run<Tiles<Bf16>>(call, wide, tiles, kTileWarps, stream)
                  : run<Rows<Bf16, float>>(call, wide, rows, kRowWarps, stream);
    default:
      return same ? run<Tiles<Half>>(call, wide, tiles, kTileWarps, stream)
                  : run<Rows<Half, float>>(call, wide, rows, kRowWarps, stream);
  }
}

}  // namespace reft::cuda
