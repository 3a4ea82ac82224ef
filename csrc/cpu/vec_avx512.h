// Sixteen floats, or thirty-two bf16. Compiled twice: with the instructions of AVX512_BF16, which
// take subnormal numbers (below 1.2e-38) for zero, and without.
//
// All names are local to the file that includes this.
#pragma once

#include <immintrin.h>

#include "intervene.h"

namespace reft {
namespace {

struct Vec {
  using Sum = Vec;
  static constexpr int64_t kLanes = 16;
  static constexpr int kBlock = 4;  // block edge: 4 x 4 sums fit the registers
  __m512 x;
};

// Thirty-two bf16 as they lie in memory. Their even and their odd elements are floats after one
// shift or mask, without the shuffle that widening neighbours takes.
struct Pair {
  struct Sum {
    __m512 even, odd;
  };
  static constexpr int64_t kLanes = 32;
  __m512i bits;
};
// Rows and weights both in bf16 are stepped through by Pair.
inline Pair unit_of(Bf16, Bf16) { return {_mm512_setzero_si512()}; }

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }

inline __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// bf16 in the upper half of each lane, to the nearest, ties to even; NaN stays NaN.
inline __m512i rounded(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
inline __m256i narrow(__m512 a) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16));
#endif
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

// The nearest numbers that the type of the first argument has.
inline Vec round_to(float, Vec a) { return a; }
inline Vec round_to(Bf16, Vec a) { return {widen(narrow(a.x))}; }
inline Vec round_to(Half, Vec a) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT))};
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

inline __m512 even(Pair a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a.bits, 16)); }
inline __m512 odd(Pair a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a.bits, _mm512_set1_epi32(int(0xFFFF0000))));
}

inline Pair load_pair(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
inline Pair load_pair(const Bf16* p, int64_t n) {
  return {_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p)};
}
inline void store(Bf16* p, Pair a) { _mm512_storeu_si512(p, a.bits); }
inline void store_part(Bf16* p, Pair a, int64_t n) {
  _mm512_mask_storeu_epi16(p, (__mmask32)((1u << n) - 1u), a.bits);
}

// 0, 16, 1, 17, … : the order that puts two halves of a register in turn.
inline __m512i zipped() {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

inline Vec dot(Pair a, Pair b, Vec sum) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(sum.x, (__m512bh)a.bits, (__m512bh)b.bits)};
#else
  const __m512 first = _mm512_fmadd_ps(even(a), even(b), sum.x);
  return {_mm512_fmadd_ps(odd(a), odd(b), first)};
#endif
}
inline Pair::Sum fma(Vec c, Pair a, Pair::Sum sum) {
  return {_mm512_fmadd_ps(c.x, even(a), sum.even), _mm512_fmadd_ps(c.x, odd(a), sum.odd)};
}
inline Pair add(Pair a, Pair::Sum b) {
  const __m512 low = _mm512_add_ps(even(a), b.even), high = _mm512_add_ps(odd(a), b.odd);
#ifdef __AVX512BF16__
  // Sixteen of `low`, then sixteen of `high`, in one instruction; zipped by the next.
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return {_mm512_permutexvar_epi16(zipped(), halves)};
#else
  return {_mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(rounded(low), 16), rounded(high))};
#endif
}

inline float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }

}  // namespace
}  // namespace reft
