// Hidden states that are still a sum: the rows that the plan edits take what the addend has,
// rounded to their dtype, and the addend is 0 there. The edit itself is the launch behind this one.
//
// A block takes a tile's rows and some columns, a thread eight columns of each row.
#include "sizes.cuh"

namespace reft::cuda {
namespace {

constexpr int kThreads = static_cast<int>(kFoldColumns) / 8;

template <class H, bool kAligned>
__global__ void __launch_bounds__(kThreads) fold_rows(const FoldCall call, int chunks) {
  const Work work(call.plan, blockIdx.x / chunks);
  if (work.span.rank == 0) return;
  const int chunk = static_cast<int>(blockIdx.x % chunks);
  const int col = chunk * static_cast<int>(kFoldColumns) + static_cast<int>(threadIdx.x) * 8;
  const int left = width_of(call) - col;
  for (int at = 0; at < work.tile.count; ++at) {
    const int row = call.plan.rows[work.tile.start + at];
    if (row < 0 || row >= call.row_count) continue;
    H* const to = static_cast<H*>(call.h.data) + offset(row, call.h.stride) + col;
    H* const from = static_cast<H*>(call.addend.data) + offset(row, call.addend.stride) + col;
    Eight<H> x, y;
    x.template load<kAligned>(to, left, true);
    y.template load<kAligned>(from, left, true);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      round_to(x[c] + y[c], &x.values[c]);
      round_to(0.0f, &y.values[c]);
    }
    x.template store<kAligned>(to, left);
    y.template store<kAligned>(from, left);
  }
}

template <class H>
const char* run(const FoldCall& call, cudaStream_t stream) {
  const int64_t chunks = (call.d + kFoldColumns - 1) / kFoldColumns, size = sizeof(H);
  const bool wide = aligned(call.h.data, call.h.stride, call.d, size) &&
                    aligned(call.addend.data, call.addend.stride, call.d, size);
  const Launch how{call.tile_count * chunks, 1, kThreads, 1, 0, stream};
  return launch(wide ? fold_rows<H, true> : fold_rows<H, false>, how, call,
                static_cast<int>(chunks));
}

}  // namespace

const char* launch_fold(const FoldCall& call, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0) return nullptr;
  switch (call.dtype) {
    case Dtype::f32:
      return run<float>(call, stream);
    case Dtype::bf16:
      return run<Bf16>(call, stream);
    default:
      return run<Half>(call, stream);
  }
}

}  // namespace reft::cuda
