// The norm that follows an edit, of the rows as they were written (schema.py's `Norm`):
//
//     y = x / sqrt(mean(x²) + eps) · weight,   of x − mean(x) in x's place where it is centred
//
// Means are sums over d in the order of sums.cuh, so they have the same bits in every batch.
#pragma once

#include "held.cuh"

namespace reft::cuda {

template <class Held, class Sums, bool kOne>
struct NormPass {
  using T = typename Held::Type;
  using Layout = typename Held::Layout;

  const ForwardCall& call;
  const Sums& sums;
  Held& held;
  int& turn;

  __device__ bool centred() const { return call.norm.kind & kCentred; }

  // Adds one unit, which `held` has as it was written, to the rows' sums: of x where the norm is
  // centred, of x² where it is not.
  __device__ void add_unit(int unit) const {
    if (centred()) {
      add(unit, [](float x, int, float sum) { return sum + x; });
    } else {
      add(unit, [](float x, int, float sum) { return fmaf(x, x, sum); });
    }
  }

  // Writes the norm of the rows, once all units were added.
  __device__ void write() const {
    Eight<T> weight, shift;
    if (kOne) {  // under way while the sums meet
      load(weight, call.norm.weight, sums.block);
      load(shift, call.norm.shift, sums.block);
    }
    const float d = static_cast<float>(call.d);
    float mean[Layout::kRows] = {}, scale[Layout::kRows];
    if (centred()) {
      meet(mean, [d](float sum) { return sum / d; });
      for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
        if (!kOne) held.load(call.h, unit, width_of(call));
        add(unit,
            [&mean](float x, int i, float sum) { return fmaf(x - mean[i], x - mean[i], sum); });
      }
    }
    const float eps = call.norm.eps;
    meet(scale, [d, eps](float sum) { return 1.0f / sqrtf(sum / d + eps); });

    for (int unit = sums.block; unit < sums.units; unit += sums.blocks) {
      if (!kOne) {
        held.load(call.h, unit, width_of(call));
        load(weight, call.norm.weight, unit);
        load(shift, call.norm.shift, unit);
      }
#pragma unroll
      for (int i = 0; i < Layout::kRows; ++i) {
        Eight<T>& out = held.x[i];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float y = (out[c] - mean[i]) * scale[i];
          if (call.norm.kind & kRound) {
            round_to(y, &out.values[c]);
            y = out[c];
          }
          y *= call.norm.kind & kPlusOne ? 1.0f + weight[c] : weight[c];
          round_to(call.norm.shift == nullptr ? y : y + shift[c], &out.values[c]);
        }
      }
      held.store({call.norm.out, call.d}, unit, width_of(call));
    }
  }

 private:
  __device__ void load(Eight<T>& factors, const void* from, int unit) const {
    const int col = Layout::column(unit);
    factors.template load<Held::kWide>(static_cast<const T*>(from) + col, width_of(call) - col,
                                       from != nullptr);
  }

  template <class Term>
  __device__ void add(int unit, Term term) const {
    const int left = width_of(call) - Layout::column(unit);
    float parts[Layout::kRows] = {};
#pragma unroll
    for (int i = 0; i < Layout::kRows; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (c < left) parts[i] = term(held.x[i][c], i, parts[i]);
      }
    }
    Layout::add_up(parts, sums.warp(unit, threadIdx.x / 32));
    sums.template close<Layout::kSlots>(unit, turn);
  }

  // What `finish` makes of each row's sum.
  template <class Finish>
  __device__ void meet(float (&result)[Layout::kRows], Finish finish) const {
    sums.template meet<Layout::kSlots>(turn);
    if (threadIdx.x < Layout::kSlots) {
      sums.values()[threadIdx.x] = finish(sums.total(static_cast<int>(threadIdx.x), turn));
    }
    sync_block();
    ++turn;
#pragma unroll
    for (int i = 0; i < Layout::kRows; ++i) result[i] = sums.values()[Layout::slot(i)];
  }
};

}  // namespace reft::cuda
