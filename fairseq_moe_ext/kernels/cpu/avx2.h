/* What tiles.h is made of on a CPU with AVX2, FMA and F16C. */

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SET avx2
#define LANES 8
#define ROWS 3
#define INLINE_ROWS 2
#define V __m256
INLINE __m256i bfloat16_bits(__m256 value) { /* of eight values, each in 32 bits: to the nearest, ties to even */
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(is_nan));
}
INLINE __m256 load_avx2(const void *from, int64_t at, const int dtype) {
  if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)from + at);
  __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
  if (dtype == FLOAT16) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE void store_avx2(void *to, int64_t at, __m256 value, const int dtype) {
  if (dtype == FLOAT32) {
    _mm256_storeu_ps((float *)to + at, value);
    return;
  }
  __m128i *target = (__m128i *)((uint16_t *)to + at);
  if (dtype == FLOAT16) {
    _mm_storeu_si128(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  __m256i bits = bfloat16_bits(value);
  _mm_storeu_si128(target, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
INLINE __m256 fma_avx2(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE __m256 zero_avx2(void) { return _mm256_setzero_ps(); }
INLINE __m256 all_avx2(float value) { return _mm256_set1_ps(value); }
INLINE __m256 pairs_avx2(__m256 a, __m256 b) { /* sums of neighbours: a's, b's in either half */
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
INLINE quarter sums_avx2(const __m256 *v) {
  __m256 all = pairs_avx2(pairs_avx2(v[0], v[1]), pairs_avx2(v[2], v[3]));
  return (quarter)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
INLINE quarter load4_avx2(const void *from, int64_t at, const int dtype) {
  if (dtype == FLOAT32) return (quarter)_mm_loadu_ps((const float *)from + at);
  __m128i halves = _mm_loadl_epi64((const __m128i *)((const uint16_t *)from + at));
  if (dtype == FLOAT16) return (quarter)_mm_cvtph_ps(halves);
  return (quarter)_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}
INLINE void store4_avx2(void *to, int64_t at, quarter value, const int dtype) {
  if (dtype == FLOAT32) {
    _mm_storeu_ps((float *)to + at, (__m128)value);
    return;
  }
  __m128i bits;
  if (dtype == FLOAT16) {
    bits = _mm_cvtps_ph((__m128)value, _MM_FROUND_TO_NEAREST_INT);
  } else {
    bits = _mm256_castsi256_si128(bfloat16_bits(_mm256_castps128_ps256((__m128)value)));
    bits = _mm_packus_epi32(bits, bits);
  }
  _mm_storel_epi64((__m128i *)((uint16_t *)to + at), bits);
}
INLINE __m256 max_avx2(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
INLINE __m256 round_avx2(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE __m256 scale_avx2(__m256 a, __m256 n) {
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}
INLINE __m256 if_negative_avx2(__m256 x, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, x); }
#include "tiles.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
