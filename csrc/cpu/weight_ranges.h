// Which plan rows sum into which pool rows, for the weight gradients.
#pragma once

#include <vector>

#include "intervene.h"

namespace reft {

// Pool rows [first, first + rank), all covered by the same segments: their terms, in the plan's
// order.
struct WeightRange {
  int64_t first, rank;
  std::vector<Term> terms;
};

// Cuts the pool at the edges of all spans in use. Several segments may share pool rows (an adapter
// at two position groups, or a subspace of another's range); each pool row gets one sum over all of
// them, so no two threads ever add to the same number.
std::vector<WeightRange> weight_ranges(const Plan& plan, int64_t tile_count);

// dc = Σ p, for the rows of one range.
void bias_gradient(const Backward& args, const WeightRange& range, float* dbias);

// dsource = p, [n, source.stride], of the rows of all tiles; others are not written.
void source_gradient(const Backward& args, int64_t tile_count, float* dsource);

}  // namespace reft
