// A source for each row, beside the c that all rows of a segment share. All names are local to the
// file that includes this, as those of kernel.h are.
#pragma once

#include "intervene.h"

namespace reft {
namespace {

// z[r][m] += source of the rows of a tile, of which m counts those that are no padding.
inline void add_source(const Source& source, const Plan& plan, const Tile& tile, int64_t rank,
                       float* z) {
  for (int64_t at = tile.start; at < int64_t{tile.start} + tile.count; ++at) {
    if (plan.rows[at] < 0) continue;
    for (int64_t r = 0; r < rank; ++r) z[r * kTile] += source.data[at * source.stride + r];
    ++z;
  }
}

}  // namespace
}  // namespace reft
