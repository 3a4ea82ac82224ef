#include "weight_ranges.h"

#include <algorithm>

namespace reft {
namespace {

// The plan's rows that take one span: tiles that follow one another are joined.
struct Run {
  Span span;
  int32_t segment, start, stop;
};

std::vector<Run> runs_of(const Plan& plan, int64_t tile_count) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < tile_count; ++i) {
    const Tile tile = plan.tiles[i];
    const Span span = span_of(plan, tile);
    if (span.rank == 0) continue;
    if (!runs.empty() && runs.back().segment == tile.segment && runs.back().stop == tile.start) {
      runs.back().stop += tile.count;
    } else {
      runs.push_back({span, tile.segment, tile.start, tile.start + tile.count});
    }
  }
  return runs;
}

}  // namespace

std::vector<WeightRange> weight_ranges(const Plan& plan, int64_t tile_count) {
  const std::vector<Run> runs = runs_of(plan, tile_count);
  std::vector<int64_t> edges;
  for (const Run& run : runs) {
    edges.push_back(run.span.first);
    edges.push_back(int64_t{run.span.first} + run.span.rank);
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  std::vector<WeightRange> ranges;
  for (size_t i = 0; i + 1 < edges.size(); ++i) {
    ranges.push_back({edges[i], edges[i + 1] - edges[i], {}});
  }
  for (const Run& run : runs) {
    const int64_t first = run.span.first, end = first + run.span.rank;
    const auto edge = std::lower_bound(edges.begin(), edges.end(), first);
    for (size_t i = edge - edges.begin(); i < ranges.size() && ranges[i].first < end; ++i) {
      const int32_t column = static_cast<int32_t>(ranges[i].first - first);
      ranges[i].terms.push_back({run.start, run.stop, column});
    }
  }
  const auto unused = [](const WeightRange& range) { return range.terms.empty(); };
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(), unused), ranges.end());
  return ranges;
}

void bias_gradient(const Backward& args, const WeightRange& range, float* dbias) {
  for (int64_t r = 0; r < range.rank; ++r) {
    double sum = 0;
    for (const Term& term : range.terms) {
      for (int64_t at = term.start; at < term.stop; ++at) {
        if (args.plan.rows[at] >= 0) sum += args.p[at * args.rank_stride + term.column + r];
      }
    }
    dbias[range.first + r] = static_cast<float>(sum);
  }
}

void source_gradient(const Backward& args, int64_t tile_count, float* dsource) {
  for (int64_t t = 0; t < tile_count; ++t) {
    const Tile tile = args.plan.tiles[t];
    const int64_t rank = span_of(args.plan, tile).rank;
    for (int64_t at = tile.start; at < int64_t{tile.start} + tile.count; ++at) {
      if (args.plan.rows[at] < 0) continue;
      const float* const p = args.p + at * args.rank_stride;
      std::copy(p, p + rank, dsource + at * args.source.stride);
    }
  }
}

}  // namespace reft
