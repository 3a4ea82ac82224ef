// Sixteen floats. Included inside one translation unit only, in a namespace of its own.
#pragma once

#include <immintrin.h>

#include "intervene.h"

namespace reft {
namespace {

struct Vec {
  static constexpr int64_t kLanes = 16;
  static constexpr int kBlock = 4;  // block edge: 4 x 4 sums fit the registers
  __m512 x;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }

inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// To the nearest, ties to even; NaN stays NaN.
inline __m256i narrow(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Bf16* p) { return {widen(load16(p))}; }
inline Vec load(const Half* p) { return {_mm512_cvtph_ps(load16(p))}; }

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
inline void store(Bf16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(a.x)); }
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

// The first n < kLanes elements; the other lanes are zero, and not written.
inline Vec load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load_part(const Bf16* p, int64_t n) {
  return {widen(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load_part(const Half* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline void store_part(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.x); }
inline void store_part(Bf16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a.x));
}
inline void store_part(Half* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }

}  // namespace
}  // namespace reft
