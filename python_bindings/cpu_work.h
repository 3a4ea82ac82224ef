// What all bindings of the CPU's kernels do with threads and results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tensors.h"

namespace reft {

// Work (in products, see Checked::work) that is worth waking another thread for: some 20 µs.
constexpr int64_t kThreadWork = int64_t{1} << 20;

// Floats of scratch that lie on the stack.
constexpr int64_t kStackScratch = 1024;

// Runs body(item, scratch) for every item, on as many threads as the work is worth.
template <class Body>
void for_each(int64_t items, int64_t work, int64_t scratch, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, items * kThreadWork / std::max<int64_t>(work, 1));
  // What one thread does is done here: the way into torch and the heap takes longer than a decode
  // step's edit.
  if (items <= grain && scratch <= kStackScratch) {
    alignas(64) float buffer[kStackScratch];
    for (int64_t i = 0; i < items; ++i) body(i, buffer);
    return;
  }
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> buffer(new float[scratch]);
    for (int64_t i = begin; i < end; ++i) body(i, buffer.get());
  });
}

// By the C function and not by stable::new_empty, which looks its op up by name: a microsecond.
inline Tensor contiguous_like(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  std::vector<int64_t> strides(dim, 1);
  for (int64_t i = dim - 1; i > 0; --i) {
    strides[i - 1] = strides[i] * std::max<int64_t>(tensor.size(i), 1);
  }
  int32_t dtype;
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, tensor.sizes().data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

}  // namespace reft
