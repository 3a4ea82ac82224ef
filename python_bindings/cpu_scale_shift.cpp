// Registers the elementwise CPU kernels as the `native` overloads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu_work.h"
#include "weight_ranges.h"

namespace reft {
namespace {

// What one element of an edited row costs, in products.
constexpr int64_t kElementWork = 4;

int64_t work_of(const Checked& checked, int64_t d) { return checked.positions * d * kElementWork; }

// body(tile) for the tiles that have something to do.
template <class Body>
void for_each_tile(const Checked& checked, int64_t d, const Body& body) {
  for_each(checked.tile_count, work_of(checked, d), 0, [&](int64_t i, float*) {
    const Tile& tile = checked.plan.tiles[i];
    if (span_of(checked.plan, tile).rank > 0) body(tile);
  });
}

void run(const Rows& h, const CheckedScales& checked) {
  if (checked.max_rank == 0 || h.count == 0) return;
  const ScaleShift args{h.matrix, h.d, h.dtype, checked.scales, checked.plan};
  for_each_tile(checked, h.d, [&](const Tile& tile) { scale_shift_tile(args, tile); });
}

void scale_shift_(Tensor h, const Tensor& scale_less_one, const Tensor& shift, const Tensor& rows,
                  const Tensor& tiles, const Tensor& spans) {
  const Rows view = writable_rows(h);
  const CheckedScales checked =
      check_scales_and_plan(scale_less_one, shift, rows, tiles, spans, view);
  check_apart(view, checked);
  run(view, checked);
}

Tensor scale_shift(const Tensor& h, const Tensor& scale_less_one, const Tensor& shift,
                   const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                   const Tensor& /*offsets*/) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = writable_rows(out);
  const CheckedScales checked =
      check_scales_and_plan(scale_less_one, shift, rows, tiles, spans, view);
  torch::stable::copy_(out, h);
  run(view, checked);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_backward(const Tensor& grad, const Tensor& hs,
                                                        const Tensor& scale_less_one,
                                                        const Tensor& shift, const Tensor& rows,
                                                        const Tensor& tiles, const Tensor& spans,
                                                        const Tensor& /*offsets*/, bool need_h,
                                                        bool need_pool) {
  Tensor grad_holder, hs_holder;
  const Rows g = readable_rows(grad, "grad", &grad_holder);
  const Rows x = readable_rows(hs, "hs", &hs_holder);
  const CheckedScales checked = check_scales_and_plan(scale_less_one, shift, rows, tiles, spans, g);
  STD_TORCH_CHECK(x.dtype == g.dtype, "hs: must have grad's dtype");
  STD_TORCH_CHECK(hs.dim() == 2 && x.d == g.d && hs.size(0) == checked.positions,
                  "hs: must be [n, d] = [", checked.positions, ", ", g.d, "]");
  Tensor dh = torch::stable::new_empty(grad, {0});
  if (need_h) {
    dh = contiguous_like(grad);
    torch::stable::copy_(dh, grad);
  }
  const auto gradient_of = [&](const Tensor& tensor) {
    return need_pool ? torch::stable::new_zeros(tensor, tensor.sizes())
                     : torch::stable::new_empty(tensor, {0});
  };
  Tensor dscale = gradient_of(scale_less_one), dshift = gradient_of(shift);
  const auto result = [&] { return std::make_tuple(dh, dscale, dshift); };
  if (checked.max_rank == 0 || g.count == 0) return result();

  const ScaleShiftBackward args{
      g.matrix,    x.matrix, Matrix{need_h ? dh.mutable_data_ptr() : nullptr, g.d},
      g.d,         g.dtype,  checked.scales,
      checked.plan};
  if (need_h) {
    for_each_tile(checked, g.d, [&](const Tile& tile) { scale_shift_backward_tile(args, tile); });
  }
  if (!need_pool) return result();

  float* const ds = static_cast<float*>(dscale.mutable_data_ptr());
  float* const dv = static_cast<float*>(dshift.mutable_data_ptr());
  const std::vector<WeightRange> ranges = weight_ranges(checked.plan, checked.tile_count);
  const int64_t slices = (g.d + kSlice - 1) / kSlice;
  for_each(static_cast<int64_t>(ranges.size()) * slices, work_of(checked, g.d), 0,
           [&](int64_t i, float*) {
             const WeightRange& range = ranges[i / slices];
             const int64_t begin = i % slices * kSlice, skip = range.first * g.d;
             const Range view{range.first, range.rank, range.terms.data(),
                              static_cast<int64_t>(range.terms.size())};
             scale_shift_sums(args, view, begin, std::min(begin + kSlice, g.d), ds + skip,
                              dv + skip);
           });
  return result();
}

}  // namespace
}  // namespace reft

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CPU, library) {
  library.impl("scale_shift_.native", TORCH_BOX(&reft::scale_shift_));
  library.impl("scale_shift.native", TORCH_BOX(&reft::scale_shift));
  library.impl("scale_shift_backward.native", TORCH_BOX(&reft::scale_shift_backward));
}
