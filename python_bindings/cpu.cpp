// Registers the CPU kernels as the `native` overloads, through LibTorch's stable ABI only: one
// binary serves every torch from 2.10 on, with any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu_work.h"
#include "launch.h"
#include "weight_ranges.h"

namespace reft {
namespace {

// What one element of a row's norm costs, in products.
constexpr int64_t kNormWork = 4;

const Isa& isa() {
  const IsaChoice& choice = select_isa();
  STD_TORCH_CHECK(choice.isa != nullptr, choice.error);
  return *choice.isa;
}

void run_forward(const Rows& h, const Checked& checked, const Source& source = {}) {
  if (checked.max_rank == 0 || h.count == 0) return;
  const Isa& kernels = isa();
  const Forward args{h.matrix, h.d, h.dtype, checked.pool, checked.plan, source};
  for_each(checked.tile_count, checked.work, forward_scratch(checked.max_rank),
           [&](int64_t i, float* scratch) {
             const Tile& tile = args.plan.tiles[i];
             if (span_of(args.plan, tile).rank > 0) kernels.forward_tile(args, tile, scratch);
           });
}

void intervene_(Tensor h, const Tensor& down, const Tensor& up, const Tensor& bias,
                const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans) {
  const Rows view = writable_rows(h);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  check_apart(view, checked);
  run_forward(view, checked);
}

void intervene_sum_(Tensor h, Tensor addend, const Tensor& down, const Tensor& up,
                    const Tensor& bias, const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                    const Tensor& spans) {
  const Rows view = writable_rows(h);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  check_apart(view, checked);
  const Rows other = writable_addend(addend, view);
  check_apart(other, checked);
  if (checked.max_rank == 0 || view.count == 0) return;
  const Isa& kernels = isa();
  const Forward args{view.matrix, view.d, view.dtype, checked.pool, checked.plan, {}};
  // A tile's rows are still in the cache when they are edited.
  for_each(checked.tile_count, checked.work, forward_scratch(checked.max_rank),
           [&](int64_t i, float* scratch) {
             const Tile& tile = args.plan.tiles[i];
             if (span_of(args.plan, tile).rank == 0) return;
             kernels.fold_tile(args, other.matrix, tile);
             kernels.forward_tile(args, tile, scratch);
           });
}

Tensor intervene_norm_(Tensor h, const Tensor& down, const Tensor& up, const Tensor& bias,
                       const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                       const Tensor& spans, const Tensor& weight,
                       const std::optional<Tensor>& shift, double eps, int64_t norm) {
  const Rows view = writable_rows(h);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  check_apart(view, checked);
  RowNorm norms = check_norm(weight, shift, eps, norm, view);
  check_cover(checked.plan, checked.tile_count, view.count);
  Tensor out = contiguous_like(h);
  if (view.count == 0) return out;
  norms.out = {out.mutable_data_ptr(), view.d};
  const Isa& kernels = isa();
  const Forward args{view.matrix, view.d, view.dtype, checked.pool, checked.plan, {}};
  // A tile's rows are still in the cache when their norm reads them.
  for_each(checked.tile_count, checked.work + view.count * view.d * kNormWork,
           forward_scratch(checked.max_rank), [&](int64_t i, float* scratch) {
             const Tile& tile = args.plan.tiles[i];
             if (span_of(args.plan, tile).rank > 0) kernels.forward_tile(args, tile, scratch);
             for (int64_t m = tile.start; m < int64_t{tile.start} + tile.count; ++m) {
               if (args.plan.rows[m] >= 0) kernels.norm_row(norms, args.plan.rows[m]);
             }
           });
  return out;
}

Tensor intervene(const Tensor& h, const Tensor& down, const Tensor& up, const Tensor& bias,
                 const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                 const Tensor& /*offsets*/) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = writable_rows(out);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  torch::stable::copy_(out, h);
  run_forward(view, checked);
  return out;
}

// The gradients of both edits; of the source only where there is one.
struct Gradients {
  Tensor h, down, up, bias, source;
};

Gradients gradients(const Tensor& grad, const Tensor& hs, const Tensor* source, const Tensor& down,
                    const Tensor& up, const Tensor& bias, const Tensor& kind, const Tensor& rows,
                    const Tensor& tiles, const Tensor& spans, bool need_h, bool need_pool) {
  Tensor grad_holder, hs_holder;
  const Rows g = readable_rows(grad, "grad", &grad_holder);
  const Rows x = readable_rows(hs, "hs", &hs_holder);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, g);
  STD_TORCH_CHECK(x.dtype == g.dtype, "hs: must have grad's dtype");
  STD_TORCH_CHECK(hs.dim() == 2 && x.d == g.d && hs.size(0) == checked.positions,
                  "hs: must be [n, d] = [", checked.positions, ", ", g.d, "]");
  const Source added = source != nullptr ? check_source(*source, checked) : Source{};

  const Tensor nothing = torch::stable::new_empty(grad, {0});
  Tensor dh = nothing;
  if (need_h) {
    dh = contiguous_like(grad);
    torch::stable::copy_(dh, grad);
  }
  const auto gradient_of = [&](const Tensor& tensor) {
    return need_pool ? torch::stable::new_zeros(tensor, tensor.sizes())
                     : torch::stable::new_empty(tensor, {0});
  };
  Tensor ddown = gradient_of(down), dup = gradient_of(up), dbias = gradient_of(bias);
  Tensor dsource = source != nullptr ? torch::stable::new_zeros(*source, source->sizes()) : nothing;
  const auto result = [&] { return Gradients{dh, ddown, dup, dbias, dsource}; };
  if (checked.max_rank == 0 || g.count == 0) return result();

  const Isa& kernels = isa();
  const int64_t rank_stride = checked.max_rank;
  const std::unique_ptr<float[]> coefficients(new float[2 * checked.positions * rank_stride]);
  const Backward args{g.matrix,
                      x.matrix,
                      Matrix{need_h ? dh.mutable_data_ptr() : nullptr, g.d},
                      g.d,
                      g.dtype,
                      checked.pool,
                      checked.plan,
                      coefficients.get(),
                      coefficients.get() + checked.positions * rank_stride,
                      rank_stride,
                      added};
  for_each(checked.tile_count, checked.work, backward_scratch(checked.max_rank),
           [&](int64_t i, float* scratch) {
             const Tile& tile = args.plan.tiles[i];
             if (span_of(args.plan, tile).rank > 0) kernels.backward_tile(args, tile, scratch);
           });
  if (source != nullptr) {
    source_gradient(args, checked.tile_count, static_cast<float*>(dsource.mutable_data_ptr()));
  }
  if (!need_pool) return result();

  const PoolGrad out{ddown.mutable_data_ptr(), dup.mutable_data_ptr()};
  float* const dc = static_cast<float*>(dbias.mutable_data_ptr());
  const std::vector<WeightRange> ranges = weight_ranges(checked.plan, checked.tile_count);
  for (const WeightRange& range : ranges) bias_gradient(args, range, dc);
  const int64_t slices = (g.d + kSlice - 1) / kSlice;
  for_each(static_cast<int64_t>(ranges.size()) * slices, checked.work,
           weight_scratch(checked.max_rank), [&](int64_t i, float* scratch) {
             const WeightRange& range = ranges[i / slices];
             const int64_t begin = i % slices * kSlice;
             const Range view{range.first, range.rank, range.terms.data(),
                              static_cast<int64_t>(range.terms.size())};
             kernels.weight_grad(args, out, view, begin, std::min(begin + kSlice, g.d), scratch);
           });
  return result();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> intervene_backward(
    const Tensor& grad, const Tensor& hs, const Tensor& down, const Tensor& up, const Tensor& bias,
    const Tensor& kind, const Tensor& rows, const Tensor& tiles, const Tensor& spans,
    const Tensor& /*offsets*/, bool need_h, bool need_pool) {
  const Gradients found =
      gradients(grad, hs, nullptr, down, up, bias, kind, rows, tiles, spans, need_h, need_pool);
  return std::make_tuple(found.h, found.down, found.up, found.bias);
}

void intervene_source_(Tensor h, const Tensor& source, const Tensor& down, const Tensor& up,
                       const Tensor& bias, const Tensor& kind, const Tensor& rows,
                       const Tensor& tiles, const Tensor& spans) {
  const Rows view = writable_rows(h);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  check_apart(view, checked);
  run_forward(view, checked, check_source(source, checked, &view));
}

Tensor intervene_source(const Tensor& h, const Tensor& source, const Tensor& down, const Tensor& up,
                        const Tensor& bias, const Tensor& kind, const Tensor& rows,
                        const Tensor& tiles, const Tensor& spans, const Tensor& /*offsets*/) {
  STD_TORCH_CHECK(h.dim() >= 1, "h: must be [..., d], had no dimension");
  Tensor out = contiguous_like(h);
  const Rows view = writable_rows(out);
  const Checked checked = check_pool_and_plan(down, up, bias, kind, rows, tiles, spans, view);
  const Source added = check_source(source, checked);
  torch::stable::copy_(out, h);
  run_forward(view, checked, added);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> intervene_source_backward(
    const Tensor& grad, const Tensor& hs, const Tensor& source, const Tensor& down,
    const Tensor& up, const Tensor& bias, const Tensor& kind, const Tensor& rows,
    const Tensor& tiles, const Tensor& spans, const Tensor& /*offsets*/, bool need_h,
    bool need_pool) {
  const Gradients found =
      gradients(grad, hs, &source, down, up, bias, kind, rows, tiles, spans, need_h, need_pool);
  return std::make_tuple(found.h, found.down, found.up, found.bias, found.source);
}

// What a stand-in calls: `body`, and what it threw as a text.
template <class Body>
const char* told(const Body& body) {
  thread_local std::string error;
  try {
    body();
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
  } catch (...) {
    error = "an unknown error in the native backend";
  }
  return error.c_str();
}

Dtype dtype_of(int32_t code) {
  return code == kReftF32 ? Dtype::f32 : code == kReftBf16 ? Dtype::bf16 : Dtype::f16;
}

Rows rows_of(const ReftHidden& h) { return {{h.data, h.d}, h.count, h.d, dtype_of(h.dtype)}; }

// As the op does, from addresses: shapes and dtypes were checked when the addresses were taken; the
// plan's values are checked here as well, which costs nothing beside the call.
const char* launch_intervene_(const ReftHidden* h, const ReftPool* pool, const ReftRows* plan) {
  return told([&] {
    Checked checked{};
    checked.pool = {pool->down, pool->up, pool->bias, pool->kind, dtype_of(pool->dtype)};
    checked.plan = {plan->rows, reinterpret_cast<const Tile*>(plan->tiles),
                    reinterpret_cast<const Span*>(pool->spans)};
    checked.pool_rows = pool->rows;
    checked.positions = plan->positions;
    checked.tile_count = plan->tile_count;
    checked.segments = pool->segments;
    const Rows view = rows_of(*h);
    check_values(&checked, view);
    run_forward(view, checked);
  });
}

const char* launch_norm(const ReftHidden* h, void* out, const ReftNorm* norm) {
  return told([&] {
    const Rows view = rows_of(*h);
    const RowNorm norms{view.matrix,  {out, view.d}, view.d,    view.dtype,
                        norm->weight, norm->shift,   norm->eps, norm->norm};
    const Isa& kernels = isa();
    for_each(view.count, view.count * view.d * kNormWork, 0,
             [&](int64_t row, float*) { kernels.norm_row(norms, row); });
  });
}

int launch_grad_enabled() { return aoti_torch_grad_mode_is_enabled() ? 1 : 0; }

constexpr ReftLaunches kLaunches = {kReftLaunchesVersion, launch_grad_enabled, launch_intervene_,
                                    launch_norm};

}  // namespace
}  // namespace reft

// What the stand-ins call past torch's dispatcher.
extern "C" __attribute__((visibility("default"))) const ReftLaunches* reft_kernels_cpu_launches() {
  return &reft::kLaunches;
}

// The instruction set in use ("avx512", "avx2", "scalar"), or null with *error set.
extern "C" __attribute__((visibility("default"))) const char* reft_kernels_cpu_isa(
    const char** error) {
  const reft::IsaChoice& choice = reft::select_isa();
  *error = choice.error;
  return choice.isa != nullptr ? choice.isa->name : nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CPU, library) {
  library.impl("intervene_.native", TORCH_BOX(&reft::intervene_));
  library.impl("intervene_sum_.native", TORCH_BOX(&reft::intervene_sum_));
  library.impl("intervene_norm_.native", TORCH_BOX(&reft::intervene_norm_));
  library.impl("intervene.native", TORCH_BOX(&reft::intervene));
  library.impl("intervene_backward.native", TORCH_BOX(&reft::intervene_backward));
  library.impl("intervene_source_.native", TORCH_BOX(&reft::intervene_source_));
  library.impl("intervene_source.native", TORCH_BOX(&reft::intervene_source));
  library.impl("intervene_source_backward.native", TORCH_BOX(&reft::intervene_source_backward));
}
