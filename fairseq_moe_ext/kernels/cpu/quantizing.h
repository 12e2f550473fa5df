/* Weights -> the planes of a quantised linear layer (block.py): the arithmetic of experts/quantize.py, bit for bit.

   Every product, quotient and sum is rounded by itself, but for sums of whole numbers, which are exact. A group's 64
   numbers are added up in SUM_LANES lanes, lane l those at l, l + 8, l + 16, ..., and the lanes in pairs of neighbours.
   So a row has the same bytes on all instructions, whatever is done beside it, by however many threads.

   Legend: M = outputs, K = inputs, G = groups of GROUP inputs. */

#define SUM_LANES 8
#define AT_ONCE 4             /* candidates */
#define LEAST_EXPONENT -126   /* of a unit; this and the next two as in experts/quantize.py */
#define TINY 1e-30f
#define HUGE_STEP 1e30f
#define ROUNDER 12582912.0f   /* a sum with it has a whole number as its last bits, to the nearest, ties to even */

/* A call. weight (M, K), rows `stride` numbers apart, of `dtype`; columns (G, GROUP), what an error in each input costs,
   or NULL for 1; candidates: to how many steps a group's largest number would come.
   codes (M, G, 8 * bits bytes), scales (M, G) float16 and units (M,) float32 are filled. */
struct quantizing {
  struct team team;
  int64_t instructions, bits, dtype, outputs, inputs, stride, num_candidates;
  const char *weight;
  const float *columns, *candidates;
  char *codes, *scales, *units;
};

/* 2 to the exponent, which is from -126 to 127. */
INLINE float power(int exponent) { return of_bits((uint32_t)(exponent + 127) << 23); }

/* As frexp has it: value is 0 or its size from 0.5 to below 1 times 2 to this. */
INLINE int exponent_of(float value) {
  uint32_t size = to_bits(value) & 0x7fffffff;
  if (!size) return 0;
  if (size < 0x00800000) return (int)(to_bits(of_bits(size) * 0x1p24f) >> 23) - 126 - 24;
  return (int)(size >> 23) - 126;
}

INLINE float to_half_and_back(float value) {
  uint16_t half;
  from_float(&half, 0, value, FLOAT16);
  return to_float(&half, 0, FLOAT16);
}

INLINE quarter min_plain(quarter a, quarter b) {
  for (int l = 0; l < 4; l++) a[l] = a[l] < b[l] ? a[l] : b[l];
  return a;
}

#define SET plain
#define LANES 4
#define V quarter
#include "quantizing_row.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
INLINE __m256 min_avx2(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
#define SET avx2
#define LANES 8
#define V __m256
#include "quantizing_row.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* ---- how threads share it */

struct quantizing_work {
  const struct quantizing *call;
  int64_t rows, next, arrived, scratch_bytes; /* rows: that a thread takes at a time */
  int32_t is_bad;
  char *scratch;
};

static void quantize_some(void *of) {
  struct quantizing_work *work = of;
  const struct quantizing *call = work->call;
  int64_t arrived = __atomic_fetch_add(&work->arrived, 1, __ATOMIC_RELAXED), first;
  char *scratch = work->scratch + arrived * work->scratch_bytes;
  int (*quantize_row)(const struct quantizing *, int64_t, char *) = quantize_row_plain;
#if defined(__x86_64__)
  if (call->instructions != PLAIN) quantize_row = quantize_row_avx2;
#endif
  while ((first = __atomic_fetch_add(&work->next, work->rows, __ATOMIC_RELAXED)) < call->outputs)
    for (int64_t row = first; row < smaller(first + work->rows, call->outputs); row++)
      if (quantize_row(call, row, scratch)) __atomic_store_n(&work->is_bad, 1, __ATOMIC_RELAXED);
}

/* 0; -1 where there is no memory for what is kept meanwhile; -2 where a weight is a NaN or infinite. */
int64_t quantize_weight(const struct quantizing *call) {
  int64_t groups = parts(call->inputs, GROUP), threads = call->team.parallel ? call->team.threads : 1;
  struct quantizing_work work = {.call = call};
  work.rows = larger(1, BLOCK_BYTES / (call->inputs * SIZE(call->dtype)));
  work.scratch_bytes = lines((GROUP + 2) * groups * sizeof(float));
  work.scratch = malloc(threads * work.scratch_bytes);
  if (!work.scratch) return -1;
  if (threads > 1 && call->outputs > work.rows) call->team.parallel(quantize_some, &work, (unsigned)threads, 0);
  else quantize_some(&work);
  free(work.scratch);
  return work.is_bad ? -2 : 0;
}
