// Registers the CUDA kernels as the `native` overloads, through LibTorch's stable ABI only: one
// binary serves every torch with CUDA from 2.10 on, with any Python.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "cuda_arguments.h"

namespace reft::cuda {
namespace {

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
  check_writable(view, "h");
  check_apart(view, t, call.pool.dtype);
  return call;
}

void intervene_(Tensor h, const Tensor& down, const Tensor& up, const Tensor& bias,
                const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans) {
  run(launch_forward, h, editing(h, {down, up, bias, kind, rows, tiles, spans}));
}

// The sum first, by a launch of its own.
void intervene_sum_(Tensor h, Tensor addend, const Tensor& down, const Tensor& up,
                    const Tensor& bias, const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                    const Tensor& spans) {
  const Tensors tables{down, up, bias, kind, rows, tiles, spans};
  ForwardCall call = editing(h, tables);
  STD_TORCH_CHECK(addend.is_cuda() && addend.get_device_index() == h.get_device_index(),
                  "addend: must be on h's device, cuda:", h.get_device_index());
  const Rows view = rows_of(h, "h"), other = rows_of(addend, "addend");
  STD_TORCH_CHECK(other.dtype == view.dtype && other.d == view.d && other.count == view.count,
                  "addend: must have the dtype of h and its ", view.count, " rows of ", view.d,
                  ", had dtype ", torch::headeronly::toString(addend.scalar_type()), " and shape ",
                  shape_of(addend));
  check_writable(other, "addend");
  check_apart(view, extent_of(other), "addend");
  check_apart(other, tables, call.pool.dtype, "addend");
  const int64_t most = std::numeric_limits<int32_t>::max() / (view.d / kFoldColumns + 1);
  STD_TORCH_CHECK(call.tile_count <= most, "tiles: at most ", most, " at this width, were ",
                  call.tile_count);
  if (call.pool_rows == 0) return;
  const FoldCall sum{call.h,         {addend.mutable_data_ptr(), other.matrix.stride},
                     call.d,         call.dtype,
                     call.plan,      call.row_count,
                     call.tile_count};
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  launched(launch_fold(sum, current_stream(h)), "sum");
  run(launch_forward, h, call);
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
    check_apart(view, extent_of(tensor, bytes_of(view.dtype)), name);
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

}  // namespace
}  // namespace reft::cuda

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CUDA, library) {
  library.impl("intervene_.native", TORCH_BOX(&reft::cuda::intervene_));
  library.impl("intervene_sum_.native", TORCH_BOX(&reft::cuda::intervene_sum_));
  library.impl("intervene_norm_.native", TORCH_BOX(&reft::cuda::intervene_norm_));
  library.impl("intervene.native", TORCH_BOX(&reft::cuda::intervene));
  library.impl("intervene_backward.native", TORCH_BOX(&reft::cuda::intervene_backward));
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
