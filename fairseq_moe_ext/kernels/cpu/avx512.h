/* What tiles.h is made of on a CPU with AVX-512 (F, DQ, BW, VL), beside avx2.h. */

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#define SET avx512
#define LANES 16
#define ROWS 6
#define INLINE_ROWS 6
#define V __m512
INLINE __m512 load_avx512(const void *from, int64_t at, const int dtype) {
  if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)from + at);
  __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + at));
  if (dtype == FLOAT16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE void store_avx512(void *to, int64_t at, __m512 value, const int dtype) {
  if (dtype == FLOAT32) {
    _mm512_storeu_ps((float *)to + at, value);
    return;
  }
  __m256i *target = (__m256i *)((uint16_t *)to + at);
  if (dtype == FLOAT16) {
    _mm256_storeu_si256(target, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(target, _mm512_cvtepi32_epi16(bits));
}
INLINE __m512 fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m512 zero_avx512(void) { return _mm512_setzero_ps(); }
INLINE __m512 all_avx512(float value) { return _mm512_set1_ps(value); }
INLINE __m512 fours_avx512(__m512 a, __m512 b) { /* sums of neighbouring groups of four lanes: a's, then b's */
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE quarter sums_avx512(const __m512 *v) {
  __m512 all = fours_avx512(fours_avx512(v[0], v[1]), fours_avx512(v[2], v[3])); /* four lanes of each */
  all = _mm512_add_ps(all, _mm512_shuffle_ps(all, all, 0xb1));
  all = _mm512_add_ps(all, _mm512_shuffle_ps(all, all, 0x4e));
  __m512i ends = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return (quarter)_mm512_castps512_ps128(_mm512_permutexvar_ps(ends, all));
}
INLINE quarter load4_avx512(const void *from, int64_t at, const int dtype) { return load4_avx2(from, at, dtype); }
INLINE void store4_avx512(void *to, int64_t at, quarter value, const int dtype) { store4_avx2(to, at, value, dtype); }
INLINE __m512 max_avx512(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
INLINE __m512 round_avx512(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE __m512 scale_avx512(__m512 a, __m512 n) {
  __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_mul_ps(a, _mm512_castsi512_ps(power));
}
INLINE __m512 if_negative_avx512(__m512 x, __m512 yes, __m512 no) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), no, yes);
}
#include "tiles.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
