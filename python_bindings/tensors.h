// What both bindings ask of a tensor, whichever device it is on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace reft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

// Whether the leading dimensions of h [..., d] collapse to rows with one stride and the last one is
// contiguous; if so, that stride is set.
inline bool row_stride(const Tensor& h, int64_t* stride) {
  const int64_t last = h.dim() - 1, d = h.size(last);
  *stride = d;
  if (h.numel() == 0) return true;
  if (d > 1 && h.stride(last) != 1) return false;
  int64_t rows = 1;
  for (int64_t i = last - 1; i >= 0; --i) {
    const int64_t size = h.size(i);
    if (size == 1) continue;
    if (rows == 1) {
      *stride = h.stride(i);
    } else if (h.stride(i) != *stride * rows) {
      return false;
    }
    rows *= size;
  }
  return true;
}

// The kernels' name (f32, bf16 or f16 of their enumeration) for a tensor's dtype; an error that
// names the reference backend for float64.
template <class Dtype>
Dtype float_dtype(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name,
                      ": dtype must be Float, BFloat16 or Half in the native backend, was ",
                      torch::headeronly::toString(dtype),
                      dtype == ScalarType::Double ? "; the reference backend takes Double" : "");
  }
}

}  // namespace reft
