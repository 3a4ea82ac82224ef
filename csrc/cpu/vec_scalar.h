// Eight floats in plain C++, for any architecture. Eight and not one: a sum in eight lanes loses
// less, and compilers turn the loops into what vectors the baseline has.
#pragma once

#include <string.h>

#include "intervene.h"

namespace reft {
namespace {

struct Vec {
  using Sum = Vec;
  static constexpr int64_t kLanes = 8;
  static constexpr int kBlock = 2;  // block edge: 4 x 2 sums fit the registers
  float x[kLanes];
};

template <class F>
inline Vec each(F f) {
  Vec out;
  for (int64_t i = 0; i < Vec::kLanes; ++i) out.x[i] = f(i);
  return out;
}

inline Vec broadcast(float a) {
  return each([=](int64_t) { return a; });
}
inline Vec zero() { return broadcast(0.0f); }
inline Vec add(const Vec& a, const Vec& b) {
  return each([&](int64_t i) { return a.x[i] + b.x[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
  return each([&](int64_t i) { return a.x[i] * b.x[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each([&](int64_t i) { return a.x[i] * b.x[i] + c.x[i]; });
}

inline float from_bits(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}
inline uint32_t to_bits(float a) {
  uint32_t out;
  memcpy(&out, &a, sizeof out);
  return out;
}

inline float widen(float a) { return a; }
inline float widen(Bf16 a) { return from_bits(static_cast<uint32_t>(a.bits) << 16); }
inline float widen(Half a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16;
  const uint32_t magnitude = a.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // A subnormal is magnitude · 2⁻²⁴; a normal number only needs its exponent moved by 127 − 15.
  if (magnitude < 0x400u) return from_bits(sign | to_bits(magnitude * 0x1p-24f));
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

inline void narrow(float* p, float a) { *p = a; }
// Both to the nearest, ties to even; NaN stays NaN.
inline void narrow(Bf16* p, float a) {
  const uint32_t bits = to_bits(a);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  p->bits = (nan ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
inline void narrow(Half* p, float a) {
  const uint32_t bits = to_bits(a), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t out;
  if (magnitude > 0x7F800000u) {
    out = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= to_bits(65520.0f)) {
    out = 0x7C00u;
  } else if (magnitude < to_bits(0x1p-14f)) {
    // Adding 0.5 puts the last bit of the sum at 2⁻²⁴, the unit of half's subnormals.
    out = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    const uint32_t shifted = magnitude - (112u << 23);
    out = (shifted + 0xFFFu + ((shifted >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | out);
}

template <class T>
inline Vec load(const T* p) {
  return each([=](int64_t i) { return widen(p[i]); });
}
template <class T>
inline void store(T* p, const Vec& a) {
  for (int64_t i = 0; i < Vec::kLanes; ++i) narrow(p + i, a.x[i]);
}

// The nearest numbers that the type T of the first argument has.
template <class T>
inline Vec round_to(T number, const Vec& a) {
  return each([&](int64_t i) {
    narrow(&number, a.x[i]);
    return widen(number);
  });
}

// The first n < kLanes elements; the other lanes are zero, and not written.
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  return each([=](int64_t i) { return i < n ? widen(p[i]) : 0.0f; });
}
template <class T>
inline void store_part(T* p, const Vec& a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(p + i, a.x[i]);
}

inline float sum(const Vec& a) {
  return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
}

}  // namespace
}  // namespace reft
