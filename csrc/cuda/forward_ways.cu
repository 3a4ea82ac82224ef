// The tiles in ways that stand beside the usual one until a GPU has said which is the fastest: in
// bfloat16, aligned, from sm_90 on.
#include "forward_launch.cuh"
#include "push.cuh"

namespace reft::cuda {

// The compiler leaves the body out where there is no code for it.
template <int kSlots, bool kOne, bool kNorm>
__global__ void __launch_bounds__(kTileWarps * 32, tile_blocks(kSlots, kNorm))
    forward_push(const ForwardCall call, int shift, int room) {
  if constexpr (kHasAsync) {
    edit_tile<Bf16, kSlots, kOne, true, kNorm, PushedSums>(call, shift, room);
  }
}
template <int kSlots>
__global__ void __launch_bounds__(kTileWarps * 32, tile_blocks(kSlots, false))
    forward_ring(const ForwardCall call, int shift, int room) {
  if constexpr (kHasAsync) {
    edit_tile<Bf16, kSlots, false, true, false, Sums, Ring<Bf16>>(call, shift, room);
  }
}

namespace {

template <int kSlots, bool kNorm>
Shape shape_of(const ForwardCall& call) {
  return choose_shape<kTileWarps, kSlots * kChunk>(call.d, call.tile_count, call.pool_rows,
                                                   tile_blocks(kSlots, kNorm), true);
}
// Whether a block of this shape has one unit.
bool one_unit(int64_t d, int shift) { return d <= int64_t{kUnit} << shift; }

// What is beyond the usual way's bytes: every unit has a place in every block.
int64_t push_bytes(int64_t d, int shift, int sums) {
  const int64_t units = (d + kUnit - 1) / kUnit, share = (units + (1 << shift) - 1) >> shift;
  const int64_t places = one_unit(d, shift) ? kLargestCluster : units;
  return static_cast<int64_t>(sizeof(float)) * (2 * (places - share) * sums) + 16;
}

const char* run_way(const ForwardCall& call, void (*kernel)(const ForwardCall, int, int),
                    const Shape& shape, int64_t more, cudaStream_t stream) {
  const int cluster = 1 << shape.shift;
  const Launch how{call.tile_count * cluster, 1,     kTileWarps * 32, cluster,
                   shape.shared + more,       stream};
  return launch(kernel, how, call, shape.shift, static_cast<int>(shape.room));
}

template <bool kNorm>
const char* push(const ForwardCall& call, cudaStream_t stream) {
  if (!few_rows(call)) return "no way `push` for tiles of more than 4 rows on average";
  const Shape shape = shape_of<8, kNorm>(call);
  if (shape.shift == 0) return "no way `push` here: a block does a tile alone, nothing meets";
  const int64_t more = push_bytes(call.d, shape.shift, 8 * kChunk);
  if (one_unit(call.d, shape.shift)) {
    return run_way(call, forward_push<8, true, kNorm>, shape, more, stream);
  }
  if constexpr (kNorm) {
    return run_way(call, forward_push<8, false, true>, shape, more, stream);
  }
  // Where there is nothing but the edit, blocks with several units wait for one another once, and
  // the kernel would spill four registers.
  return "no way `push` here: a block has several units, and there is no norm";
}

template <int kSlots>
const char* ring(const ForwardCall& call, cudaStream_t stream) {
  const Shape shape = shape_of<kSlots, false>(call);
  if (one_unit(call.d, shape.shift))
    return "no way `ring` here: a block has one unit, none is next";
  return run_way(call, forward_ring<kSlots>, shape, Ring<Bf16>::kBytes, stream);
}

}  // namespace

const char* launch_forward_way(const ForwardCall& call, bool norm, cudaStream_t stream) {
  if (call.tile_count == 0 || call.row_count == 0) return nullptr;
  if (!current_chip().clusters) return "no other way than the usual one before sm_90";
  if (call.dtype != Dtype::bf16 || call.pool.dtype != Dtype::bf16) {
    return "no other way than the usual one but for h and pools in bfloat16";
  }
  if (!all_aligned(call, norm)) {
    return "no other way than the usual one but for addresses and widths that 16-byte loads fit";
  }
  if (call.way == Way::push) return norm ? push<true>(call, stream) : push<false>(call, stream);
  if (norm) return "no way `ring` with the norm";
  return few_rows(call) ? ring<8>(call, stream) : ring<16>(call, stream);
}

#ifdef __CUDACC__
namespace {

template <int kSlots, bool kNorm>
std::string way_form(const char* name, const char* form, const void* kernel, bool one) {
  const bool pushed = name[8] == 'p';
  int64_t shared[4];
  for (int shift = 0; shift < 4; ++shift) {
    const bool alone = (kFormWidth >> shift) <= kUnit;
    const bool launched = current_chip().clusters && one == alone && (shift > 0 || !pushed);
    const int64_t more =
        pushed ? push_bytes(kFormWidth, shift, kSlots * kChunk) : Ring<Bf16>::kBytes;
    const Shape shape = shape_with<kTileWarps, kSlots * kChunk>(kFormWidth, kFormPool, shift, true);
    shared[shift] = launched ? shape.shared + more : -1;
  }
  return form_text(form_names(name, form, "bfloat16", "bfloat16"), kernel, kTileWarps * 32, shared);
}

}  // namespace

std::string describe_forward_ways() {
  const auto pointer = [](auto* function) { return reinterpret_cast<const void*>(function); };
  return way_form<8, false>("forward_push", "one", pointer(forward_push<8, true, false>), true) +
         ", " +
         way_form<8, true>("forward_push with the norm", "one",
                           pointer(forward_push<8, true, true>), true) +
         ", " +
         way_form<8, true>("forward_push with the norm", "many",
                           pointer(forward_push<8, false, true>), false) +
         ", " + way_form<8, false>("forward_ring of 8", "many", pointer(forward_ring<8>), false) +
         ", " + way_form<16, false>("forward_ring of 16", "many", pointer(forward_ring<16>), false);
}
#endif

}  // namespace reft::cuda
