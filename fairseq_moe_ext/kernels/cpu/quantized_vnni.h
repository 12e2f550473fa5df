/* What quantized_tile.h is made of on a CPU with AVX-512 and VNNI, beside quantized_avx2.h: `dpbusd` adds four products
   of unsigned weights (0 to 15 of int4; of int8 with 128 added) and signed inputs to each of 32 bits. */

#if !defined(HAS_VNNI)
#define HAS_VNNI __builtin_cpu_supports("avx512vnni")
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define SET vnni
#define OFFSET8 128
#define W struct weights_vnni
struct weights_vnni {
  __m512i bytes[FEATURES];
};
INLINE struct weights_vnni read_weights_vnni(const char *const *weight, int64_t at, int64_t ahead, const int bits) {
  struct weights_vnni found;
  for (int f = 0; f < FEATURES; f++) {
    if (ahead) __builtin_prefetch(weight[f] + at + ahead);
    if (bits == 8) {
      found.bytes[f] = _mm512_xor_si512(_mm512_loadu_si512(weight[f] + at), _mm512_set1_epi8(-128));
      continue;
    }
    __m256i pairs = bytes_avx2(weight[f] + at);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(pairs), _mm256_srli_epi16(pairs, 4), 1);
    found.bytes[f] = _mm512_and_si512(both, _mm512_set1_epi8(15));
  }
  return found;
}
INLINE __m512i pairs_vnni(__m512i a, __m512i b) { /* sums of neighbours of 32 bits: a's, b's by turns */
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
INLINE integers dot_vnni(const int8_t *x, const struct weights_vnni *weights, const int bits) {
  __m512i inputs = _mm512_loadu_si512(x), v[FEATURES];
  (void)bits;
  for (int f = 0; f < FEATURES; f++) v[f] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights->bytes[f], inputs);
  __m512i a = pairs_vnni(v[0], v[1]), b = pairs_vnni(v[2], v[3]);
  a = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); /* every quarter: a sum of each */
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return (integers)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
static void widen_scales_vnni(const char *const *from, int64_t groups, float *to) { widen_scales_avx2(from, groups, to); }
INLINE quarter load4_vnni(const void *from, int64_t at, const int dtype) { return load4_avx2(from, at, dtype); }
INLINE quarter fma4_vnni(quarter a, quarter b, quarter c) { return fma4_avx2(a, b, c); }
#include "quantized_tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
