// Eight floats. All names are local to the file that includes this.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "intervene.h"

namespace reft {
namespace {

struct Vec {
  using Sum = Vec;
  static constexpr int64_t kLanes = 8;
  static constexpr int kBlock = 2;  // block edge: 4 x 2 sums fit the registers
  __m256 x;
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const Bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16))};
}
inline Vec load(const Half* p) { return {_mm256_cvtph_ps(load16(p))}; }

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
// bf16 in the upper half of each lane, to the nearest, ties to even; NaN stays NaN.
inline __m256i rounded(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, quiet, nan);
}
inline void store(Bf16* p, Vec a) {
  const __m256i high = _mm256_srli_epi32(rounded(a.x), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
inline void store(Half* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}

// The nearest numbers that the type of the first argument has.
inline Vec round_to(float, Vec a) { return a; }
inline Vec round_to(Bf16, Vec a) {
  return {_mm256_castsi256_ps(_mm256_and_si256(rounded(a.x), _mm256_set1_epi32(int(0xFFFF0000))))};
}
inline Vec round_to(Half, Vec a) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT))};
}

// The first n < kLanes elements; the other lanes are zero, and not written.
template <class T>
inline Vec load_part(const T* p, int64_t n) {
  T padded[Vec::kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
inline void store_part(T* p, Vec a, int64_t n) {
  T padded[Vec::kLanes];
  store(padded, a);
  memcpy(p, padded, n * sizeof(T));
}

inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace
}  // namespace reft
