// The backward kernels, from g = grad and the saved rows x = hs (h before the edit), with
// z = D x + c, w = U g, v = φ(z) and p = φ′(z) ⊙ w. docs/kernels.md derives what they sum.
//
// `backward_rows` writes dh of a tile's rows and keeps p and v; `backward_pool` adds up the rest.
// All sums are float32 in a fixed order.
#include "backward_pool.cuh"
#include "sizes.cuh"
#ifdef __CUDACC__
#include "forms.cuh"
#endif

namespace reft::cuda {
namespace {

constexpr int kRowWarps = kUnit / (32 * 8);
constexpr int kRowBlocks = 4;                  // a multiprocessor
constexpr int kPairs = 2;                      // rows at a time
constexpr int kRowSums = kPairs * 2 * kChunk;  // z and w
using RowSums = Sums<kRowWarps, kRowSums>;

// The rows at plan positions [at, at + count), count ≤ kPairs.
template <class H, class P, bool kAligned>
__device__ void differentiate(const BackwardCall& call, const RowSums& sums, int64_t at, int count,
                              Span span, int room, int& turn) {
  const P* down = static_cast<const P*>(call.pool.down) + span.first * call.d;
  const P* up = static_cast<const P*>(call.pool.up) + span.first * call.d;
  const int thread = threadIdx.x;
  const bool in_parts = span.rank > kMostAtOnce;  // of one row then
  const int most = in_parts ? part_of(room, sums.share()) : padded(span.rank);
  float* const values = sums.values();  // [kPairs, most]: p, 0 where there is no D

  const H *x_row[kPairs], *g_row[kPairs];
  H* out_row[kPairs];
  bool live[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t row = i < count ? call.plan.rows[at + i] : -1;
    live[i] = row >= 0 && row < call.row_count;
    x_row[i] = static_cast<const H*>(call.hs.data) + (live[i] ? (at + i) * call.hs.stride : 0);
    g_row[i] = static_cast<const H*>(call.grad.data) + (live[i] ? row * call.grad.stride : 0);
    out_row[i] = static_cast<H*>(call.dh.data) + (live[i] ? row * call.dh.stride : 0);
  }

  for (int from = 0; from < span.rank; from += most) {
    const int to = span.rank - from <= most ? span.rank : from + most;
    for (int begin = from; begin < to; begin += kChunk, ++turn) {
      const RowActivation activation(call.pool, span, begin + thread % kChunk);
      for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
        const int64_t col = int64_t{unit} * kUnit + thread * 8, left = call.d - col;
        float totals[kRowSums];
#pragma unroll
        for (int side = 0; side < 2; ++side) {  // z, then w
          float wide[kPairs][8];
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            Eight<H> row;
            row.template load<kAligned>((side ? g_row[i] : x_row[i]) + col, left, live[i]);
#pragma unroll
            for (int c = 0; c < 8; ++c) wide[i][c] = row[c];
          }
#pragma unroll
          for (int r = 0; r < kChunk; ++r) {
            Eight<P> pool;
            pool.template load<kAligned>((side ? up : down) + (begin + r) * call.d + col, left,
                                         begin + r < span.rank);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
              totals[(i * 2 + side) * kChunk + r] = dot(pool, wide[i], 0.0f);
            }
          }
        }
        sums.warp(unit, thread / 32)[thread % 32] = warp_total(totals);
        sums.close(unit, turn);
      }
      sums.meet(turn);
      if (thread < kPairs * kChunk && thread / kChunk < count) {
        const int i = thread / kChunk, r = begin + thread % kChunk;
        const int at_z = i * 2 * kChunk + thread % kChunk;
        const float z = sums.total(at_z, turn);
        const float p = activation.slope(z) * sums.total(at_z + kChunk, turn);
        values[i * most + r - from] = activation.has_down ? p : 0.0f;
        if (activation.live && call.p != nullptr && span.rank <= kKept && sums.block == 0) {
          call.p[(at + i) * kKept + r] = p;
          call.v[(at + i) * kKept + r] = activation(z);
        }
      }
    }
    sync_block();
    if (call.dh.data == nullptr) continue;

    const bool whole = to >= span.rank;
    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      const int64_t col = int64_t{unit} * kUnit + thread * 8, left = call.d - col;
      float delta[kPairs][8] = {};
      float* const carried = values + most + sums.number(unit) * kUnit + thread * 8;
      if (from > 0) {
#pragma unroll
        for (int c = 0; c < 8; ++c) delta[0][c] = carried[c];
      }
#pragma unroll 4
      for (int r = from; r < to; ++r) {
        if (call.pool.kind[span.first + r] & kNoProduct) continue;  // its D may hold anything
        Eight<P> pool;
        pool.template load<kAligned>(down + r * call.d + col, left, true);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float p = i < count ? values[i * most + r - from] : 0.0f;
#pragma unroll
          for (int c = 0; c < 8; ++c) delta[i][c] = fmaf(p, pool[c], delta[i][c]);
        }
      }
      if (!whole) {
#pragma unroll
        for (int c = 0; c < 8; ++c) carried[c] = delta[0][c];
        continue;
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        Eight<H> out;
        out.template load<kAligned>(g_row[i] + col, left, live[i]);
#pragma unroll
        for (int c = 0; c < 8; ++c) round_to(out[c] + delta[i][c], &out.values[c]);
        if (live[i]) out.template store<kAligned>(out_row[i] + col, left);
      }
    }
  }
}

template <class H, class P, bool kAligned>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks)
    backward_rows(const BackwardCall call, int shift, int room) {
  const Work work(call.plan, blockIdx.x >> shift);
  const int count = work.tile.count;
  if (count <= 0 || work.span.rank == 0) return;
  const int rank = work.span.rank;
  const int step = rank > kMostAtOnce ? 1 : rows_at_once(kPairs, rank, room);
  const RowSums sums(call.d, shift);
  int turn = 0;
  for (int done = 0; done < count; done += step) {
    const int left = count - done;
    differentiate<H, P, kAligned>(call, sums, int64_t{work.tile.start} + done,
                                  left < step ? left : step, work.span, room, turn);
  }
  leave_cluster(1 << shift);  // another block may still read this one's sums
}

template <class H, class P>
const char* run_rows(const BackwardCall& call, cudaStream_t stream) {
  const int64_t h = sizeof(H), p = sizeof(P), d = call.d;
  const bool wide = aligned(call.grad.data, call.grad.stride, d, h) &&
                    aligned(call.hs.data, call.hs.stride, d, h) &&
                    aligned(call.dh.data, call.dh.stride, d, h) &&
                    aligned(call.pool.down, d, d, p) && aligned(call.pool.up, d, d, p);
  const Shape shape =
      choose_shape<kRowWarps, kRowSums>(d, call.tile_count, call.pool_rows, kRowBlocks, false);
  const Launch how{
      call.tile_count << shape.shift, 1, kRowWarps * 32, 1 << shape.shift, shape.shared, stream};
  return launch(wide ? backward_rows<H, P, true> : backward_rows<H, P, false>, how, call,
                shape.shift, static_cast<int>(shape.room));
}

template <class H, class P>
const char* run_pool(const BackwardCall& call, cudaStream_t stream) {
  // As many blocks for eight pool rows as there are groups of rows for each, on average.
  const int64_t eights = (call.pool_rows + kChunk - 1) / kChunk;
  int shift = 0;
  while (current_chip().clusters && (1 << shift) < kSlices &&
         (eights * kGroupRows << (shift + 1)) <= call.positions) {
    ++shift;
  }
  const Launch how{eights << shift,   (call.d + kPoolColumns - 1) / kPoolColumns,
                   kPoolWarps * 32,   1 << shift,
                   pool_bytes(shift), stream};
  return launch(backward_pool<H, P>, how, call, shift);
}

}  // namespace

const char* launch_backward_rows(const BackwardCall& call, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0 || call.pool_rows == 0) return nullptr;
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run_rows<float, float>(call, stream);
    case Dtype::bf16:
      return same ? run_rows<Bf16, Bf16>(call, stream) : run_rows<Bf16, float>(call, stream);
    default:
      return same ? run_rows<Half, Half>(call, stream) : run_rows<Half, float>(call, stream);
  }
}

const char* launch_backward_pool(const BackwardCall& call, cudaStream_t stream) {
  if (call.pool_rows == 0) return nullptr;
  const bool same = call.pool.dtype == call.dtype;
  switch (call.dtype) {
    case Dtype::f32:
      return run_pool<float, float>(call, stream);
    case Dtype::bf16:
      return same ? run_pool<Bf16, Bf16>(call, stream) : run_pool<Bf16, float>(call, stream);
    default:
      return same ? run_pool<Half, Half>(call, stream) : run_pool<Half, float>(call, stream);
  }
}

#ifdef __CUDACC__
namespace {

template <class H, class P>
std::string backward_forms() {
  const auto pointer = [](auto* function) { return reinterpret_cast<const void*>(function); };
  const char *h = dtype_name<H>(), *pool = dtype_name<P>();
  const auto rows = [&](const char* form, auto* function) {
    return shared_form<kRowWarps, kRowSums>(form_names("backward_rows", form, h, pool),
                                            pointer(function), false, false);
  };
  int64_t shared[4];
  for (int shift = 0; shift < 4; ++shift) {
    shared[shift] = shift == 0 || current_chip().clusters ? pool_bytes(shift) : -1;
  }
  return rows("aligned", backward_rows<H, P, true>) + ", " +
         rows("odd", backward_rows<H, P, false>) + ", " +
         form_text(form_names("backward_pool", "all", h, pool), pointer(backward_pool<H, P>),
                   kPoolWarps * 32, shared);
}

}  // namespace

std::string describe_backward() {
  return backward_forms<float, float>() + ", " + backward_forms<Bf16, Bf16>() + ", " +
         backward_forms<Bf16, float>() + ", " + backward_forms<Half, Half>() + ", " +
         backward_forms<Half, float>();
}
#endif

}  // namespace reft::cuda
