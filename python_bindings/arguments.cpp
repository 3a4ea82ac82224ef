#include "arguments.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

namespace reft {
namespace {

void check_tensor(const Tensor& tensor, const char* name, int64_t dim, int64_t last) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": must be on the CPU, as h is");
  STD_TORCH_CHECK(tensor.dim() == dim && (last < 0 || tensor.size(dim - 1) == last), name,
                  ": must have ", dim, " dimension", dim == 1 ? "" : "s",
                  last < 0 ? "" : " and a last one of ", last < 0 ? "" : std::to_string(last),
                  ", shape was ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == wanted, name, ": dtype must be ", torch::headeronly::toString(wanted),
                  ", was ", torch::headeronly::toString(dtype));
}

const int32_t* int_data(const Tensor& tensor, const char* name, int64_t dim, int64_t last) {
  check_tensor(tensor, name, dim, last);
  check_dtype(tensor, name, ScalarType::Int);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

void set_plan(Checked* checked, const Tensor& rows, const Tensor& tiles, const Tensor& spans) {
  checked->plan.rows = int_data(rows, "rows", 1, -1);
  checked->plan.tiles = reinterpret_cast<const Tile*>(int_data(tiles, "tiles", 2, 3));
  checked->plan.spans = reinterpret_cast<const Span*>(int_data(spans, "spans", 2, 2));
  checked->positions = rows.size(0);
  checked->tile_count = tiles.size(0);
  checked->segments = spans.size(0);
}

void check_apart(const Rows& h, const Region& region) {
  if (h.count == 0 || region.bytes == 0) return;
  const char* first = static_cast<const char*>(h.matrix.data);
  const char* last = first + ((h.count - 1) * h.matrix.stride + h.d) * size_of(h.dtype);
  const char* begin = static_cast<const char*>(region.data);
  STD_TORCH_CHECK(begin + region.bytes <= first || last <= begin, "h: shares memory with ",
                  region.name, ", so it can't be edited in place");
}

}  // namespace

Rows readable_rows(const Tensor& tensor, const char* name, Tensor* holder) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() >= 1, name, ": must be [..., d], had no dimension");
  Rows rows;
  rows.dtype = float_dtype<Dtype>(tensor, name);
  rows.d = tensor.size(tensor.dim() - 1);
  rows.count = rows.d ? tensor.numel() / rows.d : 0;
  *holder = tensor;
  if (!row_stride(tensor, &rows.matrix.stride)) {
    *holder = torch::stable::contiguous(tensor);
    rows.matrix.stride = rows.d;
  }
  rows.matrix.data = const_cast<void*>(holder->const_data_ptr());
  return rows;
}

Rows writable_rows(const Tensor& h, const char* name) {
  STD_TORCH_CHECK(h.dim() >= 1, name, ": must be [..., d], had no dimension");
  Rows rows;
  rows.dtype = float_dtype<Dtype>(h, name);
  rows.d = h.size(h.dim() - 1);
  rows.count = rows.d ? h.numel() / rows.d : 0;
  STD_TORCH_CHECK(
      row_stride(h, &rows.matrix.stride), name,
      ": its last dimension must be contiguous and the others collapse to rows with one "
      "stride (h.view(-1, d) must work), because it is edited in place; shape was ",
      shape_of(h), ". Use intervene, or h.contiguous()");
  STD_TORCH_CHECK(rows.count <= 1 || rows.matrix.stride >= rows.d, name,
                  ": its rows overlap in memory (row stride ", rows.matrix.stride, ", width ",
                  rows.d, "), so it can't be edited in place");
  rows.matrix.data = h.mutable_data_ptr();
  return rows;
}

Rows writable_addend(const Tensor& addend, const Rows& h) {
  STD_TORCH_CHECK(addend.is_cpu(), "addend: must be on the CPU, as h is");
  const Rows rows = writable_rows(addend, "addend");
  STD_TORCH_CHECK(rows.dtype == h.dtype && rows.d == h.d && rows.count == h.count,
                  "addend: must have the dtype of h and its ", h.count, " rows of ", h.d,
                  ", had dtype ", torch::headeronly::toString(addend.scalar_type()), " and shape ",
                  shape_of(addend));
  const int64_t extent = rows.count ? (rows.count - 1) * rows.matrix.stride + rows.d : 0;
  check_apart(h, Region{"addend", rows.matrix.data, extent * size_of(rows.dtype)});
  return rows;
}

Checked check_pool_and_plan(const Tensor& down, const Tensor& up, const Tensor& bias,
                            const Tensor& kind, const Tensor& rows, const Tensor& tiles,
                            const Tensor& spans, const Rows& h) {
  Checked out;
  check_tensor(down, "down", 2, h.d);
  check_tensor(up, "up", 2, h.d);
  out.pool_rows = down.size(0);
  out.pool.dtype = float_dtype<Dtype>(down, "down");
  STD_TORCH_CHECK(out.pool.dtype == h.dtype || out.pool.dtype == Dtype::f32,
                  "down: dtype must be h's or Float, was ",
                  torch::headeronly::toString(down.scalar_type()));
  check_dtype(up, "up", down.scalar_type());
  check_tensor(bias, "bias", 1, out.pool_rows);
  check_dtype(bias, "bias", ScalarType::Float);
  STD_TORCH_CHECK(up.size(0) == out.pool_rows, "up: must have the shape of down ", shape_of(down),
                  ", was ", shape_of(up));
  out.pool.down = down.const_data_ptr();
  out.pool.up = up.const_data_ptr();
  out.pool.bias = static_cast<const float*>(bias.const_data_ptr());
  out.pool.kind = int_data(kind, "kind", 1, out.pool_rows);

  set_plan(&out, rows, tiles, spans);

  const int64_t pool_bytes = out.pool_rows * h.d * size_of(out.pool.dtype);
  const Region regions[] = {
      {"down", out.pool.down, pool_bytes},        {"up", out.pool.up, pool_bytes},
      {"bias", out.pool.bias, 4 * out.pool_rows}, {"kind", out.pool.kind, 4 * out.pool_rows},
      {"rows", out.plan.rows, 4 * out.positions}, {"tiles", out.plan.tiles, 12 * out.tile_count},
      {"spans", out.plan.spans, 8 * out.segments}};
  std::copy(std::begin(regions), std::end(regions), out.regions);
  check_values(&out, h);
  return out;
}

CheckedScales check_scales_and_plan(const Tensor& scale_less_one, const Tensor& shift,
                                    const Tensor& rows, const Tensor& tiles, const Tensor& spans,
                                    const Rows& h) {
  CheckedScales out{};
  check_tensor(scale_less_one, "scale_less_one", 2, h.d);
  check_tensor(shift, "shift", 2, h.d);
  check_dtype(scale_less_one, "scale_less_one", ScalarType::Float);
  check_dtype(shift, "shift", ScalarType::Float);
  out.pool_rows = scale_less_one.size(0);
  STD_TORCH_CHECK(shift.size(0) == out.pool_rows, "shift: must have the shape of scale_less_one ",
                  shape_of(scale_less_one), ", was ", shape_of(shift));
  out.scales = {static_cast<const float*>(scale_less_one.const_data_ptr()),
                static_cast<const float*>(shift.const_data_ptr())};
  set_plan(&out, rows, tiles, spans);
  const int64_t pool_bytes = 4 * out.pool_rows * h.d;
  const Region regions[] = {{"scale_less_one", out.scales.scale_less_one, pool_bytes},
                            {"shift", out.scales.shift, pool_bytes},
                            {"rows", out.plan.rows, 4 * out.positions},
                            {"tiles", out.plan.tiles, 12 * out.tile_count},
                            {"spans", out.plan.spans, 8 * out.segments}};
  std::copy(std::begin(regions), std::end(regions), out.regions);
  check_values(&out, h);
  for (int64_t s = 0; s < out.segments; ++s) {
    STD_TORCH_CHECK(out.plan.spans[s].rank <= 1, "spans: segment ", s, " has ",
                    out.plan.spans[s].rank, " elementwise pool rows, allowed are 0 and 1");
  }
  return out;
}

Checked check_plan(const Tensor& rows, const Tensor& tiles, const Tensor& spans, const Rows& h,
                   const Tensor* norms) {
  Checked out{};
  set_plan(&out, rows, tiles, spans);
  // Any pool rows will do, as none are read.
  out.pool_rows = int64_t{1} << 32;
  const void* data = nullptr;
  if (norms != nullptr) {
    check_tensor(*norms, "norms", 1, out.positions);
    check_dtype(*norms, "norms", ScalarType::Float);
    data = norms->const_data_ptr();
  }
  const Region regions[] = {{"norms", data, norms != nullptr ? 4 * out.positions : 0},
                            {"rows", out.plan.rows, 4 * out.positions},
                            {"tiles", out.plan.tiles, 12 * out.tile_count},
                            {"spans", out.plan.spans, 8 * out.segments}};
  std::copy(std::begin(regions), std::end(regions), out.regions);
  check_values(&out, h);
  return out;
}

Source check_source(const Tensor& source, const Checked& checked, const Rows* h) {
  check_tensor(source, "source", 2, -1);
  check_dtype(source, "source", ScalarType::Float);
  STD_TORCH_CHECK(source.size(0) == checked.positions && source.size(1) >= checked.max_rank,
                  "source: must be [", checked.positions, ", s] with s of at least ",
                  checked.max_rank, ", the largest rank of the plan, was ", shape_of(source));
  const Source out{static_cast<const float*>(source.const_data_ptr()), source.size(1)};
  if (h != nullptr) check_apart(*h, {"source", out.data, 4 * source.numel()});
  return out;
}

void check_values(Checked* checked, const Rows& h) {
  Checked& out = *checked;
  int64_t highest = -1;
  for (int64_t i = 0; i < out.positions; ++i) {
    highest = std::max<int64_t>(highest, out.plan.rows[i]);
  }
  STD_TORCH_CHECK(highest < h.count, "rows: must be less than ", h.count,
                  ", the number of rows of h; found ", highest);
  for (int64_t s = 0; s < out.segments; ++s) {
    const Span span = out.plan.spans[s];
    STD_TORCH_CHECK(span.rank == 0 || (span.rank > 0 && span.first >= 0 &&
                                       int64_t{span.first} + span.rank <= out.pool_rows),
                    "spans: segment ", s, " takes pool rows [", span.first, ", ",
                    int64_t{span.first} + span.rank, "), the pool has ", out.pool_rows);
  }
  out.max_rank = out.work = 0;
  for (int64_t t = 0; t < out.tile_count; ++t) {
    const Tile tile = out.plan.tiles[t];
    STD_TORCH_CHECK(tile.count >= 0 && tile.count <= kTile, "tiles: tile ", t, " has a count of ",
                    tile.count, ", allowed is 0 to ", kTile);
    if (tile.count == 0) continue;
    STD_TORCH_CHECK(tile.segment >= -1 && tile.segment < out.segments, "tiles: tile ", t,
                    " names segment ", tile.segment, " of ", out.segments);
    STD_TORCH_CHECK(tile.start >= 0 && int64_t{tile.start} + tile.count <= out.positions,
                    "tiles: tile ", t, " takes rows [", tile.start, ", ",
                    int64_t{tile.start} + tile.count, ") of a plan of ", out.positions);
    const int64_t rank = span_of(out.plan, tile).rank;
    out.max_rank = std::max(out.max_rank, rank);
    out.work += rank * (tile.count + 16) * h.d;
  }
}

void check_apart(const Rows& h, const Checked& checked) {
  for (const Region& region : checked.regions) check_apart(h, region);
}

RowNorm check_norm(const Tensor& weight, const std::optional<Tensor>& shift, double eps,
                   int64_t norm, const Rows& h) {
  const auto data = [&](const Tensor& tensor, const char* name) {
    check_tensor(tensor, name, 1, h.d);
    STD_TORCH_CHECK(float_dtype<Dtype>(tensor, name) == h.dtype, name, ": dtype must be h's, was ",
                    torch::headeronly::toString(tensor.scalar_type()));
    const Region region{name, tensor.const_data_ptr(), h.d * size_of(h.dtype)};
    check_apart(h, region);
    return region.data;
  };
  constexpr int64_t kAll = kCentred | kPlusOne | kRound;
  STD_TORCH_CHECK((norm & ~kAll) == 0,
                  "norm: must be a sum of RMS (0), CENTRED (1), PLUS_ONE (2) and ROUND (4), was ",
                  norm);
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0, "eps: must be finite and 0 or more, was ", eps);
  const void* const scale = data(weight, "weight");
  return {h.matrix, {}, h.d, h.dtype, scale, shift ? data(*shift, "shift") : nullptr, eps, norm};
}

void check_cover(const Plan& plan, int64_t tile_count, int64_t rows) {
  std::vector<bool> named(rows);
  for (int64_t t = 0; t < tile_count; ++t) {
    const Tile tile = plan.tiles[t];
    for (int64_t i = tile.start; i < int64_t{tile.start} + tile.count; ++i) {
      const int64_t row = plan.rows[i];
      if (row < 0) continue;
      STD_TORCH_CHECK(!named[row], "rows: row ", row, " of h is named twice, must be once");
      named[row] = true;
    }
  }
  const int64_t missed = std::find(named.begin(), named.end(), false) - named.begin();
  STD_TORCH_CHECK(missed == rows, "rows: row ", missed,
                  " of h is in no tile; a plan from cover, or ",
                  "make_plan with cover=True, names every row");
}

}  // namespace reft
