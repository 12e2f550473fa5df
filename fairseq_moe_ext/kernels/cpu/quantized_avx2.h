/* What quantized_tile.h is made of on a CPU with AVX2, FMA and F16C, beside avx2.h.

   `maddubs` multiplies unsigned by signed bytes and adds two products in 16 bits, where all of it fits: of int4,
   weights 0 to 15 are the unsigned ones, and even 16 of these products do (15 * 127 * 16 = 30,480); of int8, sizes of
   inputs are, times weights that take the inputs' signs (127 * 127 * 2 = 32,258). */

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SET avx2
#define OFFSET8 0
#define W struct weights_avx2
struct weights_avx2 {
  __m256i low[FEATURES], high[FEATURES]; /* the group's first half, its second */
};
INLINE __m256i bytes_avx2(const void *from) { return _mm256_loadu_si256(from); }
INLINE struct weights_avx2 read_weights_avx2(const char *const *weight, int64_t at, int64_t ahead,
                                                       const int bits) {
  struct weights_avx2 found;
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int f = 0; f < FEATURES; f++) {
    if (ahead) __builtin_prefetch(weight[f] + at + ahead);
    found.low[f] = bytes_avx2(weight[f] + at);
    if (bits == 8) {
      found.high[f] = bytes_avx2(weight[f] + at + 32);
    } else {
      found.high[f] = _mm256_and_si256(_mm256_srli_epi16(found.low[f], 4), nibble);
      found.low[f] = _mm256_and_si256(found.low[f], nibble);
    }
  }
  return found;
}
/* 32 inputs by 32 weights of int8 -> eight sums of four products. */
INLINE __m256i dot8_avx2(__m256i x, __m256i weight) {
  __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weight, x));
  return _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}
INLINE integers dot_avx2(const int8_t *x, const struct weights_avx2 *weights, const int bits) {
  __m256i first = bytes_avx2(x), second = bytes_avx2(x + 32), v[FEATURES], four;
  /* four features' vectors become one, whose every half has a sum of each: neighbours of 32 bits, then of 64 */
#define NEIGHBOURS(add, size, a, b) add(_mm256_unpacklo_##size(a, b), _mm256_unpackhi_##size(a, b))
#define SUMS_OF_FOUR(add) \
  NEIGHBOURS(add, epi64, NEIGHBOURS(add, epi32, v[0], v[1]), NEIGHBOURS(add, epi32, v[2], v[3]))
  if (bits == 8) {
    for (int f = 0; f < FEATURES; f++)
      v[f] = _mm256_add_epi32(dot8_avx2(first, weights->low[f]), dot8_avx2(second, weights->high[f]));
    four = SUMS_OF_FOUR(_mm256_add_epi32);
  } else {
    for (int f = 0; f < FEATURES; f++)
      v[f] = _mm256_add_epi16(_mm256_maddubs_epi16(weights->low[f], first),
                              _mm256_maddubs_epi16(weights->high[f], second));
    four = _mm256_madd_epi16(SUMS_OF_FOUR(_mm256_add_epi16), _mm256_set1_epi16(1));
  }
#undef SUMS_OF_FOUR
#undef NEIGHBOURS
  return (integers)_mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}
static void widen_scales_avx2(const char *const *from, int64_t groups, float *to) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    __m128 v[FEATURES];
    for (int f = 0; f < FEATURES; f++) v[f] = (__m128)load4_avx2(from[f], g, FLOAT16);
    _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
    for (int i = 0; i < 4; i++) _mm_storeu_ps(to + FEATURES * (g + i), v[i]);
  }
  for (; g < groups; g++)
    for (int f = 0; f < FEATURES; f++) to[FEATURES * g + f] = to_float(from[f], g, FLOAT16);
}
INLINE quarter fma4_avx2(quarter a, quarter b, quarter c) {
  return (quarter)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
}
#include "quantized_tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
