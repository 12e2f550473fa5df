/* The AVX-512 intrinsics that kernel.c uses, after their description in the instruction set's reference, lane by
   lane: so that its code for AVX-512 also runs, slowly, on a CPU without it. Included before that file. */

#include <immintrin.h>
#include <math.h>
#include <string.h>

typedef struct { float f[16]; } lanes_f;
typedef struct { unsigned i[16]; } lanes_i;
#define EMULATED static inline __attribute__((always_inline, unused))

EMULATED lanes_f f_of(__m512 v) { lanes_f l; memcpy(&l, &v, 64); return l; }
EMULATED lanes_i i_of(__m512i v) { lanes_i l; memcpy(&l, &v, 64); return l; }
EMULATED __m512 of_f(lanes_f l) { __m512 v; memcpy(&v, &l, 64); return v; }
EMULATED __m512i of_i(lanes_i l) { __m512i v; memcpy(&v, &l, 64); return v; }

#define EACH for (int l = 0; l < 16; l++)
#define FLOATS(name, arguments, value) EMULATED __m512 name arguments { lanes_f r; EACH r.f[l] = value; return of_f(r); }
#define INTEGERS(name, arguments, value) \
  EMULATED __m512i name arguments { lanes_i r; EACH r.i[l] = (unsigned)(value); return of_i(r); }

FLOATS(e_loadu_ps, (const float *p), p[l])
EMULATED void e_storeu_ps(float *p, __m512 v) { memcpy(p, &v, 64); }
EMULATED __m512 e_castsi512_ps(__m512i v) { return (__m512)v; }
EMULATED __m512i e_castps_si512(__m512 v) { return (__m512i)v; }
EMULATED __m128 e_castps512_ps128(__m512 v) { __m128 r; memcpy(&r, &v, 16); return r; }
FLOATS(e_setzero_ps, (void), 0)
FLOATS(e_set1_ps, (float a), a)
INTEGERS(e_set1_epi32, (int a), a)
INTEGERS(e_setr_epi32, (int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int m, int n, int o,
                        int p, int q), ((int[]){a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q})[l])
FLOATS(e_add_ps, (__m512 a, __m512 b), f_of(a).f[l] + f_of(b).f[l])
FLOATS(e_mul_ps, (__m512 a, __m512 b), f_of(a).f[l] * f_of(b).f[l])
FLOATS(e_fmadd_ps, (__m512 a, __m512 b, __m512 c), __builtin_fmaf(f_of(a).f[l], f_of(b).f[l], f_of(c).f[l]))
FLOATS(e_max_ps, (__m512 a, __m512 b), f_of(a).f[l] > f_of(b).f[l] ? f_of(a).f[l] : f_of(b).f[l])
INTEGERS(e_add_epi32, (__m512i a, __m512i b), i_of(a).i[l] + i_of(b).i[l])
INTEGERS(e_and_si512, (__m512i a, __m512i b), i_of(a).i[l] & i_of(b).i[l])
INTEGERS(e_slli_epi32, (__m512i a, unsigned n), i_of(a).i[l] << n)
INTEGERS(e_srli_epi32, (__m512i a, unsigned n), i_of(a).i[l] >> n)
INTEGERS(e_cvtps_epi32, (__m512 a), (int)nearbyintf(f_of(a).f[l]))
FLOATS(e_roundscale_ps, (__m512 a, int to), to == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) ? nearbyintf(f_of(a).f[l]) : 0)
/* 128-bit groups: the lower two from a, the upper two from b, by two bits each */
FLOATS(e_shuffle_f32x4, (__m512 a, __m512 b, int by),
       (l < 8 ? f_of(a) : f_of(b)).f[4 * (by >> 2 * (l / 4) & 3) + l % 4])
/* in every 128-bit group: the lower two from a, the upper two from b, by two bits each */
FLOATS(e_shuffle_ps, (__m512 a, __m512 b, int by), (l % 4 < 2 ? f_of(a) : f_of(b)).f[l / 4 * 4 + (by >> 2 * (l % 4) & 3)])
FLOATS(e_permutexvar_ps, (__m512i by, __m512 a), f_of(a).f[i_of(by).i[l] & 15])
EMULATED __mmask16 e_cmp_ps_mask(__m512 a, __m512 b, int how) {
  unsigned mask = 0;
  if (how == _CMP_UNORD_Q) EACH mask |= (unsigned)(isnan(f_of(a).f[l]) || isnan(f_of(b).f[l])) << l;
  return (__mmask16)mask;
}
EMULATED __mmask16 e_movepi32_mask(__m512i a) {
  unsigned mask = 0;
  EACH mask |= (i_of(a).i[l] >> 31) << l;
  return (__mmask16)mask;
}
INTEGERS(e_mask_mov_epi32, (__m512i a, __mmask16 mask, __m512i b), (mask >> l & 1 ? i_of(b) : i_of(a)).i[l])
FLOATS(e_mask_blend_ps, (__mmask16 mask, __m512 a, __m512 b), (mask >> l & 1 ? f_of(b) : f_of(a)).f[l])
EMULATED __m512i e_cvtepu16_epi32(__m256i a) {
  unsigned short h[16];
  lanes_i r;
  memcpy(h, &a, 32);
  EACH r.i[l] = h[l];
  return of_i(r);
}
EMULATED __m256i e_cvtepi32_epi16(__m512i a) {
  unsigned short h[16];
  __m256i r;
  EACH h[l] = (unsigned short)i_of(a).i[l];
  memcpy(&r, h, 32);
  return r;
}
__attribute__((target("f16c"), unused)) static __m512 e_cvtph_ps(__m256i a) {
  unsigned short h[16];
  lanes_f r;
  memcpy(h, &a, 32);
  EACH r.f[l] = _cvtsh_ss(h[l]);
  return of_f(r);
}
__attribute__((target("f16c"), unused)) static __m256i e_cvtps_ph(__m512 a, int how) {
  unsigned short h[16];
  __m256i r;
  EACH h[l] = how == _MM_FROUND_TO_NEAREST_INT ? _cvtss_sh(f_of(a).f[l], _MM_FROUND_TO_NEAREST_INT) : 0;
  memcpy(&r, h, 32);
  return r;
}
EMULATED __m512i e_loadu_si512(const void *p) { __m512i v; memcpy(&v, p, 64); return v; }
INTEGERS(e_setzero_si512, (void), 0)
INTEGERS(e_set1_epi8, (char a), (unsigned char)a * 0x01010101u)
INTEGERS(e_xor_si512, (__m512i a, __m512i b), i_of(a).i[l] ^ i_of(b).i[l])
EMULATED __m512i e_castsi256_si512(__m256i a) { lanes_i r = {{0}}; memcpy(&r, &a, 32); return of_i(r); }
EMULATED __m256i e_castsi512_si256(__m512i a) { __m256i r; memcpy(&r, &a, 32); return r; }
EMULATED __m512i e_inserti64x4(__m512i a, __m256i b, int at) {
  memcpy((char *)&a + 32 * at, &b, 32);
  return a;
}
EMULATED __m256i e_extracti64x4_epi64(__m512i a, int at) {
  __m256i r;
  memcpy(&r, (char *)&a + 32 * at, 32);
  return r;
}
/* in every 128-bit group: by turns from a and b, of the lower two, or of the upper two */
INTEGERS(e_unpacklo_epi32, (__m512i a, __m512i b), (l % 2 ? i_of(b) : i_of(a)).i[l / 4 * 4 + l % 4 / 2])
INTEGERS(e_unpackhi_epi32, (__m512i a, __m512i b), (l % 2 ? i_of(b) : i_of(a)).i[l / 4 * 4 + 2 + l % 4 / 2])
INTEGERS(e_unpacklo_epi64, (__m512i a, __m512i b), (l % 4 < 2 ? i_of(a) : i_of(b)).i[l / 4 * 4 + l % 2])
INTEGERS(e_unpackhi_epi64, (__m512i a, __m512i b), (l % 4 < 2 ? i_of(a) : i_of(b)).i[l / 4 * 4 + 2 + l % 2])
/* four products of a's unsigned and b's signed bytes, added to 32 bits */
EMULATED int four_products(unsigned a, unsigned b) {
  int sum = 0;
  for (int i = 0; i < 4; i++) sum += (int)(a >> 8 * i & 255) * (signed char)(b >> 8 * i & 255);
  return sum;
}
INTEGERS(e_dpbusd_epi32, (__m512i c, __m512i a, __m512i b), i_of(c).i[l] + (unsigned)four_products(i_of(a).i[l], i_of(b).i[l]))
#define HAS_VNNI 1

#undef _mm512_add_epi32
#define _mm512_add_epi32 e_add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps e_add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 e_and_si512
#undef _mm512_castps512_ps128
#define _mm512_castps512_ps128 e_castps512_ps128
#undef _mm512_castps_si512
#define _mm512_castps_si512 e_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps e_castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask e_cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 e_cvtepi32_epi16
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 e_cvtepu16_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps e_cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 e_cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph e_cvtps_ph
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps e_fmadd_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps e_loadu_ps
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps e_mask_blend_ps
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 e_mask_mov_epi32
#undef _mm512_max_ps
#define _mm512_max_ps e_max_ps
#undef _mm512_movepi32_mask
#define _mm512_movepi32_mask e_movepi32_mask
#undef _mm512_mul_ps
#define _mm512_mul_ps e_mul_ps
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps e_permutexvar_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps e_roundscale_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 e_set1_epi32
#undef _mm512_set1_ps
#define _mm512_set1_ps e_set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 e_setr_epi32
#undef _mm512_setzero_ps
#define _mm512_setzero_ps e_setzero_ps
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 e_shuffle_f32x4
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps e_shuffle_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 e_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 e_srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps e_storeu_ps
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 e_castsi256_si512
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 e_castsi512_si256
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 e_dpbusd_epi32
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 e_extracti64x4_epi64
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 e_inserti64x4
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 e_loadu_si512
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 e_set1_epi8
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 e_setzero_si512
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 e_unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 e_unpackhi_epi64
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 e_unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 e_unpacklo_epi64
#undef _mm512_xor_si512
#define _mm512_xor_si512 e_xor_si512
