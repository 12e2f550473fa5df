/* One linear layer per expert, each on its few rows: what a matrix library does slowest, since it lays out a weight
   anew for every product. Here a weight is read once, in its own order, four of its rows at a time, which stay in the
   cache for all rows of the expert; what comes next is fetched meanwhile. Every output is one sum in one order, whatever
   else is computed beside it. Called by grouped_linear.py; plain C, without Python or PyTorch.

   Legend: K = input features, M = output features, n = rows of one expert. */

#include <stdint.h>
#include <string.h>

#define ROWS 3  /* with FEATURES, as many sums as fit a CPU's sixteen vector registers beside their operands */
#define FEATURES 4
#define LANES 8
#define AHEAD 8 /* weight rows between the one in use and the one that is fetched */

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float quarter __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(4 * LANES)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* bfloat16 is the upper half of a float */
INLINE float to_float(const void *from, int64_t at, const int is_bfloat16) {
  if (!is_bfloat16) return ((const float *)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE vector load(const void *from, int64_t at, const int is_bfloat16) {
  vector loaded;
  if (is_bfloat16) {
    halves bits;
    memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
    words wide = __builtin_convertvector(bits, words) << 16;
    memcpy(&loaded, &wide, sizeof loaded);
  } else {
    memcpy(&loaded, (const float *)from + at, sizeof loaded);
  }
  return loaded;
}

INLINE void store(void *to, int64_t at, float value, const int is_bfloat16) {
  if (!is_bfloat16) {
    ((float *)to)[at] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) bits = 0x7fc00000; /* rounding could carry a NaN away */
  else bits += 0x7fff + ((bits >> 16) & 1); /* to the nearest, ties to even */
  ((uint16_t *)to)[at] = (uint16_t)(bits >> 16);
}

/* The lanes of each of four vectors, added up. */
INLINE quarter sums(vector a, vector b, vector c, vector d) {
  vector ab = PICK(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  vector cd = PICK(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
  vector all = PICK(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  quarter low, high;
  memcpy(&low, &all, sizeof low);
  memcpy(&high, (const char *)&all + sizeof low, sizeof high);
  return low + high;
}

/* `rows` rows (at most ROWS) from `x` and `features` weight rows (at most FEATURES) from `w` on -> their outputs. */
INLINE void tile(const void *x, int64_t x_at, const void *w, int64_t w_at, const void *bias, void *out, int64_t out_at,
                 int64_t k, int64_t m, int64_t feature, const int rows, const int features, const int fetch,
                 const int relu, const int is_bfloat16) {
  vector total[ROWS][FEATURES];
  int64_t i = 0;
  for (int r = 0; r < rows; r++)
    for (int f = 0; f < FEATURES; f++) total[r][f] = (vector){0};
  for (; i + LANES <= k; i += LANES) {
    vector weight[FEATURES];
    for (int f = 0; f < features; f++) weight[f] = load(w, w_at + f * k + i, is_bfloat16);
    if (fetch)
      for (int f = 0; f < features; f++)
        __builtin_prefetch((const char *)w + (w_at + (f + AHEAD) * k + i) * (is_bfloat16 ? 2 : 4));
    for (int r = 0; r < rows; r++) {
      vector row = load(x, x_at + r * k + i, is_bfloat16);
      for (int f = 0; f < features; f++) total[r][f] += row * weight[f];
    }
  }
  for (int r = 0; r < rows; r++) {
    quarter found = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
    for (int f = 0; f < features; f++) {
      float value = found[f];
      for (int64_t j = i; j < k; j++)
        value += to_float(x, x_at + r * k + j, is_bfloat16) * to_float(w, w_at + f * k + j, is_bfloat16);
      value += to_float(bias, feature + f, is_bfloat16);
      store(out, out_at + r * m + f, relu && value < 0 ? 0 : value, is_bfloat16);
    }
  }
}

/* FEATURES or `features` outputs of all n rows of an expert. */
INLINE void all_rows(const void *x, int64_t x_at, int64_t n, const void *w, int64_t w_at, const void *bias, void *out,
                     int64_t out_at, int64_t k, int64_t m, int64_t feature, const int features, const int relu,
                     const int is_bfloat16) {
#define TILE(rows, fetch) \
  tile(x, x_at + row * k, w, w_at, bias, out, out_at + row * m, k, m, feature, rows, features, fetch, relu, is_bfloat16)
  for (int64_t row = 0; row < n;) {
    int64_t left = n - row;
    if (left == 1) {
      if (row == 0) TILE(1, 1);
      else TILE(1, 0);
      row += 1;
    } else if (left == 2 || left == 4) { /* 2 + 2 is faster than 3 + 1 */
      if (row == 0) TILE(2, 1);
      else TILE(2, 0);
      row += 2;
    } else {
      if (row == 0) TILE(ROWS, 1);
      else TILE(ROWS, 0);
      row += ROWS;
    }
  }
}

#define ARGUMENTS \
  const void *x, const int32_t *sources, const int32_t *targets, const int32_t *counts, const int32_t *slots, \
      int64_t experts, int64_t most, const void *weight, const void *bias, void *out, int64_t k, int64_t m
#define GIVEN x, sources, targets, counts, slots, experts, most, weight, bias, out, k, m

INLINE void all_experts(ARGUMENTS, const int relu, const int is_bfloat16) {
  for (int64_t expert = 0; expert < experts; expert++) {
    int64_t n = counts[expert], from = sources[expert], to = targets[expert], first = slots[expert] * m, feature = 0;
    if (0 < n && n <= most) {
#define OUTPUTS(features) \
  all_rows(x, from * k, n, weight, (first + feature) * k, bias, out, to * m + feature, k, m, first + feature, features, \
           relu, is_bfloat16)
      for (; feature + FEATURES <= m; feature += FEATURES) OUTPUTS(FEATURES);
      for (; feature < m; feature++) OUTPUTS(1);
    }
  }
}

INLINE void any(ARGUMENTS, int relu, int is_bfloat16) {
  if (is_bfloat16) {
    if (relu) all_experts(GIVEN, 1, 1);
    else all_experts(GIVEN, 0, 1);
  } else {
    if (relu) all_experts(GIVEN, 1, 0);
    else all_experts(GIVEN, 0, 0);
  }
}

static void plain(ARGUMENTS, int relu, int is_bfloat16) { any(GIVEN, relu, is_bfloat16); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void with_avx2(ARGUMENTS, int relu, int is_bfloat16) {
  any(GIVEN, relu, is_bfloat16);
}
#endif

/* Whether this CPU can run grouped_linear with `avx2`. */
int32_t has_avx2(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

/* That grouped_linear's arguments are those below: a library of an older version lacks it. */
int32_t takes_slots(void) { return 1; }

/* Expert e's counts[e] rows of x, from row sources[e] on, times the weight in slot slots[e] -> rows targets[e] and on of
   out, with relu or without. x (N, K), weight (S, M, K), bias (S, M), out (N', M), all contiguous and of one type. Rows
   of an expert that has more than `most` are left as they are. avx2: with these instructions and FMA, or with those that
   every CPU of its kind has. */
void grouped_linear(int32_t avx2, ARGUMENTS, int32_t relu, int32_t is_bfloat16) {
#if defined(__x86_64__)
  if (avx2) {
    with_avx2(GIVEN, relu, is_bfloat16);
    return;
  }
#endif
  plain(GIVEN, relu, is_bfloat16);
}
