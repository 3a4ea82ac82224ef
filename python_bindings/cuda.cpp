// Registers the CUDA kernels as the `native` overloads, through LibTorch's stable ABI only: one
// binary serves every torch with CUDA from 2.10 on, with any Python.
//
// What can be seen from the host is checked before anything is written. The numbers of the plan lie
// on the device and are not read back: they were checked when the plan was made.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "intervene.h"
#include "scale_shift.h"
#include "tensors.h"

namespace reft::cuda {
namespace {

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Rows [count, d] of a tensor [..., d].
struct Rows {
  Matrix matrix;
  int64_t count, d;
  Dtype dtype;
};

Rows rows_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) > 0, name,
                  ": must be [..., d] with d >= 1, shape was ", shape_of(tensor));
  Rows rows;
  rows.dtype = float_dtype<Dtype>(tensor, name);
  rows.d = tensor.size(tensor.dim() - 1);
  rows.count = tensor.numel() / rows.d;
  STD_TORCH_CHECK(
      row_stride(tensor, &rows.matrix.stride), name,
      ": its last dimension must be contiguous and the others collapse to rows with one stride "
      "(h.view(-1, d) must work); shape was ",
      shape_of(tensor), ". Use intervene, or h.contiguous()");
  STD_TORCH_CHECK(rows.d <= kMaxWidth && rows.matrix.stride <= kMaxStride, name,
                  ": a row has at most ", kMaxWidth, " elements, and begins at most ", kMaxStride,
                  " after the one before; were ", rows.d, " and ", rows.matrix.stride);
  rows.matrix.data = const_cast<void*>(tensor.const_data_ptr());
  return rows;
}

void check(const Tensor& tensor, const char* name, const Tensor& h, ScalarType dtype, int64_t dim,
           int64_t first, int64_t last) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == h.get_device_index(), name,
                  ": must be on h's device, cuda:", h.get_device_index());
  STD_TORCH_CHECK(tensor.dim() == dim && (first < 0 || tensor.size(0) == first) &&
                      (last < 0 || tensor.size(dim - 1) == last),
                  name, ": must have ", dim, " dimension", dim == 1 ? "" : "s",
                  first < 0 ? "" : ", a first one of " + std::to_string(first),
                  last < 0 ? "" : ", a last one of " + std::to_string(last), "; shape was ",
                  shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": dtype must be ",
                  torch::headeronly::toString(dtype), ", was ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

const int32_t* ints(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// The pool and the plan as tensors.
struct Tensors {
  const Tensor &down, &up, &bias, &kind, &rows, &tiles, &spans;
};

void check_apart(const Rows& h, const Tensor& other, int64_t element, const char* name) {
  const char* first = static_cast<const char*>(h.matrix.data);
  if (h.count == 0) return;
  const char* last = first + ((h.count - 1) * h.matrix.stride + h.d) * bytes_of(h.dtype);
  const char* begin = static_cast<const char*>(other.const_data_ptr());
  STD_TORCH_CHECK(other.numel() == 0 || begin + other.numel() * element <= first || last <= begin,
                  "h: shares memory with ", name, ", so it can't be edited in place");
}

// Checks everything against rows like h and fills what forward and backward share.
template <class Call>
void fill(Call* call, const Tensor& h, const Rows& view, const Tensors& t) {
  const Dtype pool = float_dtype<Dtype>(t.down, "down");
  STD_TORCH_CHECK(pool == view.dtype || pool == Dtype::f32,
                  "down: dtype must be h's or Float, was ",
                  torch::headeronly::toString(t.down.scalar_type()));
  const int64_t count = t.bias.dim() == 1 ? t.bias.size(0) : -1;
  check(t.bias, "bias", h, ScalarType::Float, 1, -1, -1);
  check(t.down, "down", h, t.down.scalar_type(), 2, count, view.d);
  check(t.up, "up", h, t.down.scalar_type(), 2, count, view.d);
  check(t.kind, "kind", h, ScalarType::Int, 1, count, -1);
  check(t.rows, "rows", h, ScalarType::Int, 1, -1, -1);
  check(t.tiles, "tiles", h, ScalarType::Int, 2, -1, 3);
  check(t.spans, "spans", h, ScalarType::Int, 2, -1, 2);
  call->d = view.d;
  call->dtype = view.dtype;
  call->pool = {t.down.const_data_ptr(), t.up.const_data_ptr(),
                static_cast<const float*>(t.bias.const_data_ptr()), ints(t.kind), pool};
  call->plan = {ints(t.rows), reinterpret_cast<const Tile*>(ints(t.tiles)),
                reinterpret_cast<const Span*>(ints(t.spans))};
  call->row_count = view.count;
  call->tile_count = t.tiles.size(0);
  call->pool_rows = count;
  // A grid has at most 2^31 − 1 blocks.
  STD_TORCH_CHECK(call->tile_count <= std::numeric_limits<int32_t>::max() / 8, "tiles: at most ",
                  std::numeric_limits<int32_t>::max() / 8, ", were ", call->tile_count);
}

cudaStream_t current_stream(const Tensor& h) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(h.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void launched(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernel ", kernel, " was not launched: ", error,
                  " (the failure of a kernel before it is reported here, too; with "
                  "CUDA_LAUNCH_BLOCKING=1 it is reported where it arose)");
}

// What reft_kernels_cuda_way has set.
std::atomic<int32_t> chosen_way{static_cast<int32_t>(Way::usual)};

// Runs one of the forward kernels on h's device and current stream.
void run(const char* (*launch)(const ForwardCall&, cudaStream_t), const Tensor& h,
         ForwardCall call) {
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  call.way = static_cast<Way>(chosen_way.load(std::memory_order_relaxed));
  launched(launch(call, current_stream(h)), "intervene");
}

// A call that edits h in place.
ForwardCall editing(Tensor& h, const Tensors& t) {
  const Rows view = rows_of(h, "h");
  ForwardCall call;
  fill(&call, h, view, t);
  call.positions = t.rows.size(0);
  call.h = {h.mutable_data_ptr(), view.matrix.stride};
  STD_TORCH_CHECK(view.count <= 1 || view.matrix.stride >= view.d,
                  "h: its rows overlap in memory (row stride ", view.matrix.stride, ", width ",
                  view.d, "), so it can't be edited in place");
  const int64_t element = bytes_of(call.pool.dtype);
  check_apart(view, t.down, element, "down");
  check_apart(view, t.up, element, "up");
  check_apart(view, t.bias, 4, "bias");
  check_apart(view, t.kind, 4, "kind");
  check_apart(view, t.rows, 4, "rows");
  check_apart(view, t.tiles, 4, "tiles");
  check_apart(view, t.spans, 4, "spans");
  return call;
}

void intervene_(Tensor h, const Tensor& down, const Tensor& up, const Tensor& bias,
                const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans) {
  run(launch_forward, h, editing(h, {down, up, bias, kind, rows, tiles, spans}));
}

Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, tensor.sizes());
}

Tensor intervene_norm_(Tensor h, const Tensor& down, const Tensor& up, const Tensor& bias,
                       const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                       const Tensor& spans, const Tensor& weight,
                       const std::optional<Tensor>& shift, double eps, int64_t norm) {
  constexpr int64_t kAll = kCentred | kPlusOne | kRound;
  ForwardCall call = editing(h, {down, up, bias, kind, rows, tiles, spans});
  const Rows view = rows_of(h, "h");
  const auto vector = [&](const Tensor& tensor, const char* name) {
    check(tensor, name, h, h.scalar_type(), 1, view.d, -1);
    check_apart(view, tensor, bytes_of(view.dtype), name);
    return tensor.const_data_ptr();
  };
  const void* const scale = vector(weight, "weight");
  const void* const offset = shift ? vector(*shift, "shift") : nullptr;
  STD_TORCH_CHECK((norm & ~kAll) == 0,
                  "norm: must be a sum of RMS (0), CENTRED (1), PLUS_ONE (2) and ROUND (4), was ",
                  norm);
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0, "eps: must be finite and 0 or more, was ", eps);
  // Which rows the plan names stands on the device; that it can't name all can be seen here.
  STD_TORCH_CHECK(call.positions >= call.row_count, "rows: must name each of h's ", call.row_count,
                  " rows, were ", call.positions);
  STD_TORCH_CHECK(call.tile_count >= (call.row_count + kTile - 1) / kTile, "tiles: must cover h's ",
                  call.row_count, " rows, at most ", kTile, " each, were ", call.tile_count);
  Tensor out = contiguous_like(h);
  call.norm = {scale, offset, out.mutable_data_ptr(), static_cast<float>(eps),
               static_cast<int32_t>(norm)};
  run(launch_forward_norm, h, call);
  return out;
}

Tensor intervene(const Tensor& h, const Tensor& down, const Tensor& up, const Tensor& bias,
                 const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                 const Tensor& /*offsets*/) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = rows_of(out, "h");
  ForwardCall call;
  fill(&call, h, view, {down, up, bias, kind, rows, tiles, spans});
  call.positions = rows.size(0);
  torch::stable::copy_(out, h);
  call.h = view.matrix;
  run(launch_forward, h, call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> intervene_backward(
    const Tensor& grad, const Tensor& hs, const Tensor& down, const Tensor& up, const Tensor& bias,
    const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans,
    const Tensor& offsets, bool need_h, bool need_pool) {
  // Autograd's gradients are often expanded or transposed; those are copied.
  int64_t stride = 0;
  STD_TORCH_CHECK(grad.dim() >= 1, "grad: must be [..., d], had no dimension");
  const Tensor readable = row_stride(grad, &stride) ? grad : torch::stable::contiguous(grad);
  const Rows g = rows_of(readable, "grad");
  BackwardCall call;
  fill(&call, grad, g, {down, up, bias, kind, rows, tiles, spans});
  check(offsets, "offsets", grad, ScalarType::Int, 1, spans.size(0) + 1, -1);
  check(hs, "hs", grad, grad.scalar_type(), 2, rows.size(0), g.d);

  const Tensor nothing = torch::stable::new_empty(grad, {0});
  Tensor dh = nothing;
  if (need_h) {
    dh = contiguous_like(grad);
    torch::stable::copy_(dh, grad);
  }
  const auto gradient_of = [&](const Tensor& tensor) {
    return need_pool ? contiguous_like(tensor) : torch::stable::new_empty(tensor, {0});
  };
  Tensor ddown = gradient_of(down), dup = gradient_of(up), dbias = gradient_of(bias);
  const auto result = [&] { return std::make_tuple(dh, ddown, dup, dbias); };
  if (!need_h && !need_pool) return result();

  Tensor kept = nothing;
  call.p = call.v = nullptr;
  if (need_pool) {
    kept = torch::stable::new_empty(bias, {2, rows.size(0), kKept});
    call.p = static_cast<float*>(kept.mutable_data_ptr());
    call.v = call.p + rows.size(0) * kKept;
  }
  call.grad = g.matrix;
  call.hs = {const_cast<void*>(hs.const_data_ptr()), g.d};
  call.dh = {need_h ? dh.mutable_data_ptr() : nullptr, g.d};
  call.rank_stride = kKept;
  call.positions = rows.size(0);
  call.segments = spans.size(0);
  call.offsets = ints(offsets);
  call.pool_grad = {nullptr, nullptr};
  call.bias_grad = nullptr;

  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t stream = current_stream(grad);
  launched(launch_backward_rows(call, stream), "backward_rows");
  if (need_pool) {
    call.pool_grad = {ddown.mutable_data_ptr(), dup.mutable_data_ptr()};
    call.bias_grad = static_cast<float*>(dbias.mutable_data_ptr());
    launched(launch_backward_pool(call, stream), "backward_pool");
  }
  return result();
}

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
  STD_TORCH_CHECK(view.count <= 1 || view.matrix.stride >= view.d,
                  "h: its rows overlap in memory (row stride ", view.matrix.stride, ", width ",
                  view.d, "), so it can't be edited in place");
  check_apart(view, scale_less_one, 4, "scale_less_one");
  check_apart(view, shift, 4, "shift");
  check_apart(view, rows, 4, "rows");
  check_apart(view, tiles, 4, "tiles");
  check_apart(view, spans, 4, "spans");
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
  library.impl("intervene_.native", TORCH_BOX(&reft::cuda::intervene_));
  library.impl("intervene_norm_.native", TORCH_BOX(&reft::cuda::intervene_norm_));
  library.impl("intervene.native", TORCH_BOX(&reft::cuda::intervene));
  library.impl("intervene_backward.native", TORCH_BOX(&reft::cuda::intervene_backward));
  library.impl("scale_shift_.native", TORCH_BOX(&reft::cuda::scale_shift_));
  library.impl("scale_shift.native", TORCH_BOX(&reft::cuda::scale_shift));
  library.impl("scale_shift_backward.native", TORCH_BOX(&reft::cuda::scale_shift_backward));
}

// What the current device makes of each form of the kernels (registers, shared memory, blocks and
// clusters that it holds at once), as JSON. For tuning; through ctypes. The text is good until the
// next call in this thread.
extern "C" __attribute__((visibility("default"))) const char* reft_kernels_cuda_occupancy() {
  thread_local std::string text;
  text = "[" + reft::cuda::describe_forward() + ", " + reft::cuda::describe_forward_norm() + ", " +
         reft::cuda::describe_forward_ways() + ", " + reft::cuda::describe_backward() + "]";
  return text.c_str();
}

// Has the forward kernels of the whole process run in another way (a number of `Way`), and returns
// the one before; where there is no such way, −1, and nothing changes. For measurements; through
// ctypes.
extern "C" __attribute__((visibility("default"))) int reft_kernels_cuda_way(int way) {
  if (way < 0 || way > static_cast<int>(reft::cuda::Way::ring)) return -1;
  return reft::cuda::chosen_way.exchange(way);
}
