// Registers the elementwise CUDA kernels as the `native` overloads.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda_arguments.h"
#include "scale_shift.h"

namespace reft::cuda {
namespace {

// The elementwise pool and the plan, checked against rows like h; fills what both directions share.
template <class Call>
void fill_scales(Call* call, const Tensor& h, const Rows& view, const Tensor& scale_less_one,
                 const Tensor& shift, const Tensor& rows, const Tensor& tiles,
                 const Tensor& spans) {
  check(scale_less_one, "scale_less_one", h, ScalarType::Float, 2, -1, view.d);
  check(shift, "shift", h, ScalarType::Float, 2, scale_less_one.size(0), view.d);
  check(rows, "rows", h, ScalarType::Int, 1, -1, -1);
  check(tiles, "tiles", h, ScalarType::Int, 2, -1, 3);
  check(spans, "spans", h, ScalarType::Int, 2, -1, 2);
  call->d = view.d;
  call->dtype = view.dtype;
  call->pool = {static_cast<const float*>(scale_less_one.const_data_ptr()),
                static_cast<const float*>(shift.const_data_ptr())};
  call->plan = {ints(rows), reinterpret_cast<const Tile*>(ints(tiles)),
                reinterpret_cast<const Span*>(ints(spans))};
  call->row_count = view.count;
  call->tile_count = tiles.size(0);
  // A grid has at most 2^31 − 1 blocks.
  const int64_t most = std::numeric_limits<int32_t>::max() / (view.d / kScaleSumColumns + 1);
  STD_TORCH_CHECK(call->tile_count <= most && scale_less_one.size(0) <= most,
                  "tiles, scale_less_one: at most ", most, " of each at this width, were ",
                  call->tile_count, " and ", scale_less_one.size(0));
}

void scale_shift_(Tensor h, const Tensor& scale_less_one, const Tensor& shift, const Tensor& rows,
                  const Tensor& tiles, const Tensor& spans) {
  const Rows view = rows_of(h, "h");
  ScaleShiftCall call;
  fill_scales(&call, h, view, scale_less_one, shift, rows, tiles, spans);
  check_writable(view, "h");
  check_apart(view, extent_of(scale_less_one, 4), "scale_less_one");
  check_apart(view, extent_of(shift, 4), "shift");
  check_apart(view, extent_of(rows, 4), "rows");
  check_apart(view, extent_of(tiles, 4), "tiles");
  check_apart(view, extent_of(spans, 4), "spans");
  call.h = {h.mutable_data_ptr(), view.matrix.stride};
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  launched(launch_scale_shift(call, current_stream(h)), "scale_shift");
}

Tensor scale_shift(const Tensor& h, const Tensor& scale_less_one, const Tensor& shift,
                   const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                   const Tensor& /*offsets*/) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = rows_of(out, "h");
  ScaleShiftCall call;
  fill_scales(&call, h, view, scale_less_one, shift, rows, tiles, spans);
  torch::stable::copy_(out, h);
  call.h = view.matrix;
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  launched(launch_scale_shift(call, current_stream(h)), "scale_shift");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_backward(const Tensor& grad, const Tensor& hs,
                                                        const Tensor& scale_less_one,
                                                        const Tensor& shift, const Tensor& rows,
                                                        const Tensor& tiles, const Tensor& spans,
                                                        const Tensor& offsets, bool need_h,
                                                        bool need_pool) {
  int64_t stride = 0;
  STD_TORCH_CHECK(grad.dim() >= 1, "grad: must be [..., d], had no dimension");
  const Tensor readable = row_stride(grad, &stride) ? grad : torch::stable::contiguous(grad);
  const Rows g = rows_of(readable, "grad");
  ScaleShiftBackwardCall call;
  fill_scales(&call, grad, g, scale_less_one, shift, rows, tiles, spans);
  check(offsets, "offsets", grad, ScalarType::Int, 1, spans.size(0) + 1, -1);
  check(hs, "hs", grad, grad.scalar_type(), 2, rows.size(0), g.d);
  Tensor dh = torch::stable::new_empty(grad, {0});
  if (need_h) {
    dh = contiguous_like(grad);
    torch::stable::copy_(dh, grad);
  }
  const auto gradient_of = [&](const Tensor& tensor) {
    return need_pool ? contiguous_like(tensor) : torch::stable::new_empty(tensor, {0});
  };
  Tensor dscale = gradient_of(scale_less_one), dshift = gradient_of(shift);
  call.grad = g.matrix;
  call.hs = {const_cast<void*>(hs.const_data_ptr()), g.d};
  call.dh = {need_h ? dh.mutable_data_ptr() : nullptr, g.d};
  call.pool_rows = scale_less_one.size(0);
  call.segments = spans.size(0);
  call.offsets = ints(offsets);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  if (need_h) launched(launch_scale_shift_rows(call, stream), "scale_shift_rows");
  if (need_pool) {
    call.scale_grad = static_cast<float*>(dscale.mutable_data_ptr());
    call.shift_grad = static_cast<float*>(dshift.mutable_data_ptr());
    launched(launch_scale_shift_sums(call, stream), "scale_shift_sums");
  }
  return std::make_tuple(dh, dscale, dshift);
}

}  // namespace
}  // namespace reft::cuda

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CUDA, library) {
  library.impl("scale_shift_.native", TORCH_BOX(&reft::cuda::scale_shift_));
  library.impl("scale_shift.native", TORCH_BOX(&reft::cuda::scale_shift));
  library.impl("scale_shift_backward.native", TORCH_BOX(&reft::cuda::scale_shift_backward));
}
