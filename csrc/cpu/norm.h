// The norm of one row, written once over `Vec`. Every isa_*.cpp includes this after its vector
// type; all names are local to that file.
//
// Batch invariance: the sums are taken in an order that depends on d only.
#pragma once

#include <math.h>

#include "intervene.h"

namespace reft {
namespace {

// Added to a number it leaves it as it is, −0 too; as 0 would not.
constexpr float kNothing = -0.0f;

// step(v, sum) over the vectors v of x + offset, in four sums. The last vector is filled up with
// zeros.
template <class H, class Step>
float row_sum(const H* x, int64_t d, const Vec& offset, Step step) {
  constexpr int kSums = 4;
  constexpr int64_t kLanes = Vec::kLanes;
  Vec sums[kSums] = {zero(), zero(), zero(), zero()};
  int64_t j = 0;
  for (; j + kSums * kLanes <= d; j += kSums * kLanes)
    for (int i = 0; i < kSums; ++i) sums[i] = step(add(load(x + j + i * kLanes), offset), sums[i]);
  for (; j + kLanes <= d; j += kLanes) sums[0] = step(add(load(x + j), offset), sums[0]);
  if (j < d) {
    float last[kLanes];
    store(last, add(load_part(x + j, d - j), offset));
    sums[1] = step(load_part(last, d - j), sums[1]);
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// y = ((x + offset) · inverse) · weight + shift
template <bool kRounded, bool kShifted, class H>
void write_row(const RowNorm& a, const H* x, H* y, float offset, float inverse) {
  const H* const weight = static_cast<const H*>(a.weight);
  const H* const shift = static_cast<const H*>(a.shift);
  const Vec minus_mean = broadcast(offset), scale = broadcast(inverse);
  const Vec one = broadcast(a.norm & kPlusOne ? 1.0f : kNothing), nothing = broadcast(kNothing);
  const auto value = [&](auto read) {
    Vec v = mul(add(read(x), minus_mean), scale);
    if (kRounded) v = round_to(H{}, v);
    return fma(v, add(read(weight), one), kShifted ? read(shift) : nothing);
  };
  int64_t j = 0;
  for (; j + Vec::kLanes <= a.d; j += Vec::kLanes)
    store(y + j, value([j](const H* p) { return load(p + j); }));
  if (j < a.d) {
    const int64_t n = a.d - j;
    store_part(y + j, value([j, n](const H* p) { return load_part(p + j, n); }), n);
  }
}

template <class H>
void norm_typed(const RowNorm& a, int64_t row) {
  const H* const x = static_cast<const H*>(a.h.data) + row * a.h.stride;
  H* const y = static_cast<H*>(a.out.data) + row * a.out.stride;
  float offset = kNothing;
  if (a.norm & kCentred) {
    const auto plain = [](const Vec& v, const Vec& sum) { return add(v, sum); };
    offset = -row_sum(x, a.d, broadcast(kNothing), plain) / static_cast<float>(a.d);
  }
  const auto square = [](const Vec& v, const Vec& sum) { return fma(v, v, sum); };
  const double mean = double{row_sum(x, a.d, broadcast(offset), square)} / static_cast<double>(a.d);
  const float inverse = static_cast<float>(1.0 / sqrt(mean + a.eps));
  const bool rounded = a.norm & kRound, shifted = a.shift != nullptr;
  const auto write = rounded ? (shifted ? write_row<true, true, H> : write_row<true, false, H>)
                             : (shifted ? write_row<false, true, H> : write_row<false, false, H>);
  write(a, x, y, offset, inverse);
}

void norm_row(const RowNorm& a, int64_t row) {
  switch (a.dtype) {
    case Dtype::f32:
      return norm_typed<float>(a, row);
    case Dtype::bf16:
      return norm_typed<Bf16>(a, row);
    case Dtype::f16:
      return norm_typed<Half>(a, row);
  }
}

}  // namespace
}  // namespace reft
