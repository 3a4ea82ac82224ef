// Registers the CPU kernels that keep norms as the `native` overloads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "arguments.h"
#include "cpu_work.h"
#include "keep_norm.h"

namespace reft {
namespace {

// What one element of a row costs here, in products.
constexpr int64_t kElementWork = 4;

// body(tile) for the tiles whose rows keep their norm.
template <class Body>
void for_each_tile(const Checked& checked, const Rows& h, const Body& body) {
  if (checked.max_rank == 0 || h.count == 0) return;
  for_each(checked.tile_count, checked.positions * h.d * kElementWork, 0, [&](int64_t i, float*) {
    const Tile& tile = checked.plan.tiles[i];
    if (span_of(checked.plan, tile).rank > 0) body(tile);
  });
}

float* data_of(const Tensor& norms) {
  return const_cast<float*>(static_cast<const float*>(norms.const_data_ptr()));
}

Tensor zeros_for(const Checked& checked, const Tensor& like) {
  return torch::stable::new_zeros(like, {checked.positions}, ScalarType::Float);
}

Tensor row_norms(const Tensor& h, const Tensor& rows, const Tensor& tiles, const Tensor& spans) {
  Tensor holder;
  const Rows view = readable_rows(h, "h", &holder);
  const Checked checked = check_plan(rows, tiles, spans, view);
  Tensor norms = zeros_for(checked, h);
  const KeepNorm args{view.matrix, view.d, view.dtype, data_of(norms), checked.plan};
  for_each_tile(checked, view, [&](const Tile& tile) { row_norms_tile(args, tile); });
  return norms;
}

void run(const Rows& h, const Tensor& norms, const Checked& checked) {
  const KeepNorm args{h.matrix, h.d, h.dtype, data_of(norms), checked.plan};
  for_each_tile(checked, h, [&](const Tile& tile) { restore_norms_tile(args, tile); });
}

void restore_norms_(Tensor h, const Tensor& norms, const Tensor& rows, const Tensor& tiles,
                    const Tensor& spans) {
  const Rows view = writable_rows(h);
  const Checked checked = check_plan(rows, tiles, spans, view, &norms);
  check_apart(view, checked);
  run(view, norms, checked);
}

Tensor restore_norms(const Tensor& h, const Tensor& norms, const Tensor& rows, const Tensor& tiles,
                     const Tensor& spans) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = writable_rows(out);
  const Checked checked = check_plan(rows, tiles, spans, view, &norms);
  torch::stable::copy_(out, h);
  run(view, norms, checked);
  return out;
}

std::tuple<Tensor, Tensor> restore_norms_backward(const Tensor& grad, const Tensor& hs,
                                                  const Tensor& norms, const Tensor& rows,
                                                  const Tensor& tiles, const Tensor& spans) {
  Tensor grad_holder, hs_holder;
  const Rows g = readable_rows(grad, "grad", &grad_holder);
  const Rows x = readable_rows(hs, "hs", &hs_holder);
  const Checked checked = check_plan(rows, tiles, spans, g, &norms);
  STD_TORCH_CHECK(x.dtype == g.dtype, "hs: must have grad's dtype");
  STD_TORCH_CHECK(hs.dim() == 2 && x.d == g.d && hs.size(0) == checked.positions,
                  "hs: must be [n, d] = [", checked.positions, ", ", g.d, "]");
  Tensor dh = contiguous_like(grad), dnorms = zeros_for(checked, grad);
  torch::stable::copy_(dh, grad);
  const KeepNormBackward args{g.matrix,
                              x.matrix,
                              Matrix{dh.mutable_data_ptr(), g.d},
                              g.d,
                              g.dtype,
                              data_of(norms),
                              data_of(dnorms),
                              checked.plan};
  for_each_tile(checked, g, [&](const Tile& tile) { restore_norms_backward_tile(args, tile); });
  return std::make_tuple(dh, dnorms);
}

}  // namespace
}  // namespace reft

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CPU, library) {
  library.impl("row_norms.native", TORCH_BOX(&reft::row_norms));
  library.impl("restore_norms_.native", TORCH_BOX(&reft::restore_norms_));
  library.impl("restore_norms.native", TORCH_BOX(&reft::restore_norms));
  library.impl("restore_norms_backward.native", TORCH_BOX(&reft::restore_norms_backward));
}
