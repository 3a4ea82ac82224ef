// What the bindings of the CUDA kernels ask of tensors, and how they launch.
//
// What can be seen from the host is checked before anything is written. The numbers of the plan lie
// on the device and are not read back: they were checked when the plan was made.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <string>

#include "intervene.h"
#include "tensors.h"

namespace reft::cuda {

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Rows [count, d] of a tensor [..., d].
struct Rows {
  Matrix matrix;
  int64_t count, d;
  Dtype dtype;
};

inline Rows rows_of(const Tensor& tensor, const char* name) {
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

inline void check(const Tensor& tensor, const char* name, const Tensor& h, ScalarType dtype,
                  int64_t dim, int64_t first, int64_t last) {
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

inline const int32_t* ints(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// The pool and the plan as tensors.
struct Tensors {
  const Tensor &down, &up, &bias, &kind, &rows, &tiles, &spans;
};

// Memory from a row's first byte to the last row's end.
struct Extent {
  const char *begin, *end;
};
inline Extent extent_of(const Rows& rows) {
  const char* const begin = static_cast<const char*>(rows.matrix.data);
  const int64_t last = rows.count ? (rows.count - 1) * rows.matrix.stride + rows.d : 0;
  return {begin, begin + last * bytes_of(rows.dtype)};
}
inline Extent extent_of(const Tensor& contiguous, int64_t element) {
  const char* const begin = static_cast<const char*>(contiguous.const_data_ptr());
  return {begin, begin + contiguous.numel() * element};
}

// Refuses rows, which are edited in place and are called `whose`, that share memory with others.
inline void check_apart(const Rows& h, const Extent& other, const char* name,
                        const char* whose = "h") {
  const Extent mine = extent_of(h);
  STD_TORCH_CHECK(mine.begin == mine.end || other.begin == other.end || other.end <= mine.begin ||
                      mine.end <= other.begin,
                  whose, ": shares memory with ", name, ", so it can't be edited in place");
}
inline void check_apart(const Rows& h, const Tensors& t, Dtype pool, const char* whose = "h") {
  const int64_t element = bytes_of(pool);
  check_apart(h, extent_of(t.down, element), "down", whose);
  check_apart(h, extent_of(t.up, element), "up", whose);
  check_apart(h, extent_of(t.bias, 4), "bias", whose);
  check_apart(h, extent_of(t.kind, 4), "kind", whose);
  check_apart(h, extent_of(t.rows, 4), "rows", whose);
  check_apart(h, extent_of(t.tiles, 4), "tiles", whose);
  check_apart(h, extent_of(t.spans, 4), "spans", whose);
}

// Refuses rows that overlap one another.
inline void check_writable(const Rows& h, const char* name) {
  STD_TORCH_CHECK(h.count <= 1 || h.matrix.stride >= h.d, name,
                  ": its rows overlap in memory (row stride ", h.matrix.stride, ", width ", h.d,
                  "), so it can't be edited in place");
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

inline cudaStream_t current_stream(const Tensor& h) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(h.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void launched(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernel ", kernel, " was not launched: ", error,
                  " (the failure of a kernel before it is reported here, too; with "
                  "CUDA_LAUNCH_BLOCKING=1 it is reported where it arose)");
}

inline Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, tensor.sizes());
}

}  // namespace reft::cuda
