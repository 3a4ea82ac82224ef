// Hidden states that are still a sum: the rows of a tile take what the addend has, and the addend
// is 0 there. Included after a vector type, as kernel.h is.
#pragma once

#include <string.h>

#include "intervene.h"

namespace reft {
namespace {

template <class H>
void fold_typed(const Forward& a, const Matrix& addend, const Tile& tile) {
  for (int64_t i = tile.start; i < int64_t{tile.start} + tile.count; ++i) {
    const int64_t row = a.plan.rows[i];
    if (row < 0) continue;
    H* const to = static_cast<H*>(a.h.data) + row * a.h.stride;
    H* const from = static_cast<H*>(addend.data) + row * addend.stride;
    int64_t j = 0;
    for (; j + Vec::kLanes <= a.d; j += Vec::kLanes)
      store(to + j, add(load(to + j), load(from + j)));
    if (j < a.d) {
      const int64_t n = a.d - j;
      store_part(to + j, add(load_part(to + j, n), load_part(from + j, n)), n);
    }
    memset(from, 0, a.d * sizeof(H));
  }
}

void fold_tile(const Forward& a, const Matrix& addend, const Tile& tile) {
  switch (a.dtype) {
    case Dtype::f32:
      return fold_typed<float>(a, addend, tile);
    case Dtype::bf16:
      return fold_typed<Bf16>(a, addend, tile);
    case Dtype::f16:
      return fold_typed<Half>(a, addend, tile);
  }
}

}  // namespace
}  // namespace reft
