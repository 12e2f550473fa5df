/* A few rows times a few weight rows, and what is done to a row of values: the innermost loops, compiled once for every
   set of instructions. plain.h and its neighbours include this with SET (the names' suffix), V (a vector of LANES
   float32), ROWS (rows of a tile), INLINE_ROWS (the same where 16-bit weights are widened in it) and the functions
   load, store, fma, sums, ... of SET.

   Every output is one sum in one order: lane l adds up the inputs l, l + LANES, ... by FMA (or a product and a sum
   where there is none), then the lanes are added. Inputs that fill no vector are padded with zeros. Nothing else is
   contracted.

   Legend: K = input features, M = output features, n = rows of one expert. */

#define NAME__(name, set) name##_##set
#define NAME_(name, set) NAME__(name, set)
#define NAME(name) NAME_(name, SET)


/* The first `count` values from `from` + `at` on, then zeros. */
INLINE V NAME(load_some)(const void *from, int64_t at, int64_t count, const int dtype) {
  char values[4 * LANES] = {0};
  memcpy(values, (const char *)from + at * SIZE(dtype), count * SIZE(dtype));
  return NAME(load)(values, 0, dtype);
}

INLINE void NAME(store_some)(void *to, int64_t at, int64_t count, V value, const int dtype) {
  char values[4 * LANES];
  NAME(store)(values, 0, value, dtype);
  memcpy((char *)to + at * SIZE(dtype), values, count * SIZE(dtype));
}

/* `rows` rows (at most ROWS) times `features` weight rows (1 or FEATURES), over the inputs from `from` to before `to`.
   Sums begin at zero where from is 0, and else with those of the inputs before, in `sums`; they end in `sums`, or in
   `out` where to is k. row_stride: of the weight rows. ahead: what is fetched meanwhile, NULL: nothing. */
INLINE void NAME(tile)(const float *const *x, const char *w, int64_t row_stride, const char *ahead,
                       int64_t ahead_stride, V (*sums)[FEATURES], const void *bias, void *out, int64_t stride,
                       int64_t from, int64_t to, int64_t k, const int rows, const int features, const int relu,
                       const int weight_type, const int dtype) {
  V total[ROWS][FEATURES];
  const float *row[ROWS];
  const int64_t size = SIZE(weight_type), last = to - from;
  for (int r = 0; r < rows; r++) row[r] = x[r] + from;
  for (int r = 0; r < rows; r++)
    for (int f = 0; f < FEATURES; f++) total[r][f] = from ? sums[r][f] : NAME(zero)();
  int64_t i = 0;
#define ADD(load_weight, load_row)                                                               \
  {                                                                                              \
    V weight[FEATURES];                                                                          \
    for (int f = 0; f < features; f++) weight[f] = load_weight;                                  \
    for (int r = 0; r < rows; r++) {                                                             \
      V value = load_row;                                                                        \
      for (int f = 0; f < features; f++) total[r][f] = NAME(fma)(value, weight[f], total[r][f]); \
    }                                                                                            \
  }
#define WHOLE ADD(NAME(load)(w + f * row_stride, i, weight_type), NAME(load)(row[r], i, FLOAT32))
  if (ahead) /* also where a line is asked for twice: spread so, it costs less than once per line, all four at a time */
    for (; i + LANES <= last; i += LANES) {
      for (int f = 0; f < features; f++) __builtin_prefetch(ahead + f * ahead_stride + i * size);
      WHOLE
    }
  for (; i + LANES <= last; i += LANES) WHOLE
  if (i < last)
    ADD(NAME(load_some)(w + f * row_stride, i, last - i, weight_type), NAME(load_some)(row[r], i, last - i, FLOAT32))
#undef ADD
#undef WHOLE
  if (to < k) {
    for (int r = 0; r < rows; r++)
      for (int f = 0; f < FEATURES; f++) sums[r][f] = total[r][f];
    return;
  }
  for (int r = 0; r < rows; r++) {
    quarter value = NAME(sums)(total[r]);
    value += features == FEATURES ? NAME(load4)(bias, 0, dtype) : (quarter){to_float(bias, 0, dtype)};
    if (relu) value = at_least_zero(value);
    if (features == FEATURES) NAME(store4)(out, r * stride, value, dtype);
    else from_float(out, r * stride, value[0], dtype);
  }
}

/* `tile` for all n rows. */
INLINE void NAME(all_rows)(const float *const *x, int64_t n, const char *w, int64_t row_stride, const char *ahead,
                           int64_t ahead_stride, char *sums, const void *bias, char *out, int64_t stride, int64_t from,
                           int64_t to, int64_t k, const int most, const int features, const int relu,
                           const int weight_type, const int dtype) {
  for (int64_t row = 0; row < n;) { /* in parts of one size, or one less: 4 rows are 2 and 2, not 3 and 1 */
    int64_t left = n - row, tiles = (left + most - 1) / most, size = (left + tiles - 1) / tiles;
#define SIZED(rows)                                                                                                   \
  case rows:                                                                                                          \
    NAME(tile)(x + row, w, row_stride, row ? NULL : ahead, ahead_stride, (V(*)[FEATURES])sums + row, bias,            \
               out + row * stride * SIZE(dtype), stride, from, to, k, rows <= most ? rows : most, features, relu,     \
               weight_type, dtype);                                                                                   \
    break;
    switch (size) {
      SIZED(1)
      SIZED(2)
#if ROWS > 2
      SIZED(3)
#endif
#if ROWS > 3
      SIZED(4)
      SIZED(5)
      SIZED(6)
#endif
    }
#undef SIZED
    row += size;
  }
}

/* Outputs `first` to before `end` of n rows x of float32: weight (M, K) and bias (M,) of `dtype` -> out (n, stride).
   sums: n * FEATURES vectors, kept from one part of the inputs to the next. panel: FEATURES * PART float32, where
   weights are widened that many rows need. */
INLINE void NAME(features)(const float *const *x, int64_t n, const char *weight, const char *bias, char *out,
                           int64_t stride, int64_t k, int64_t first, int64_t end, char *sums, float *panel,
                           const int relu, const int dtype) {
  const int64_t size = SIZE(dtype), part = n <= ROWS ? k : PART;
  const int tallest = dtype == FLOAT32 ? ROWS : INLINE_ROWS;
#define OUTPUTS(features, most, w, row_stride, ahead, type)                                         \
  NAME(all_rows)(x, n, (const char *)(w), row_stride, ahead, k * size, sums, bias + feature * size, \
                 out + feature * size, stride, from, to, k, most, features, relu, type, dtype)
  int64_t feature = first;
  for (; feature + FEATURES <= end; feature += FEATURES)
    for (int64_t from = 0, to; from < k; from = to) {
      to = from + part < k ? from + part : k;
      const char *w = weight + (feature * k + from) * size;
      const char *ahead = w + AHEAD * k * size; /* perhaps of the next expert, or of nobody, which does no harm */
      if (dtype == FLOAT32 || n <= WIDEN_ROWS) {
        OUTPUTS(FEATURES, tallest, w, k * size, ahead, dtype);
        continue;
      }
      for (int f = 0; f < FEATURES; f++) {
        const char *its = w + f * k * size;
        int64_t i = 0;
        for (; i + LANES <= to - from; i += LANES) {
          __builtin_prefetch(ahead + (f * k + i) * size);
          NAME(store)(panel, f * PART + i, NAME(load)(its, i, dtype), FLOAT32);
        }
        if (i < to - from)
          NAME(store_some)(panel, f * PART + i, to - from - i, NAME(load_some)(its, i, to - from - i, dtype), FLOAT32);
      }
      OUTPUTS(FEATURES, ROWS, panel, 4 * PART, NULL, FLOAT32);
    }
  for (; feature < end; feature++)
    for (int64_t from = 0, to = k; from < k; from = to)
      OUTPUTS(1, tallest, weight + feature * k * size, k * size, NULL, dtype);
#undef OUTPUTS
}

static void NAME(linear)(const float *const *x, int64_t n, const void *weight, const void *bias, void *out,
                         int64_t stride, int64_t k, int64_t first, int64_t end, char *sums, float *panel, int relu,
                         int dtype) {
#define AS(type)                                                                                  \
  if (relu) NAME(features)(x, n, weight, bias, out, stride, k, first, end, sums, panel, 1, type); \
  else NAME(features)(x, n, weight, bias, out, stride, k, first, end, sums, panel, 0, type)
  if (dtype == FLOAT32) { AS(FLOAT32); }
  else if (dtype == BFLOAT16) { AS(BFLOAT16); }
  else { AS(FLOAT16); }
#undef AS
}

/* count values of a 16-bit type -> float32 */
static void NAME(widen)(float *to, const void *from, int64_t count, int dtype) {
  int64_t i = 0;
#define AS(type)                                                                                      \
  for (; i + LANES <= count; i += LANES) NAME(store)(to, i, NAME(load)(from, i, type), FLOAT32);      \
  if (i < count) NAME(store_some)(to, i, count - i, NAME(load_some)(from, i, count - i, type), FLOAT32)
  if (dtype == BFLOAT16) { AS(BFLOAT16); }
  else { AS(FLOAT16); }
#undef AS
}

/* exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial of what is left (Cephes' expf). */
INLINE V NAME(exp)(V x) {
  x = NAME(max)(x, NAME(all)(-88.0f)); /* n is -127 there, and `scale` by it gives zero: no subnormal number is left */
  V n = NAME(round)(x * NAME(all)(1.44269504088896341f));
  V r = NAME(fma)(n, NAME(all)(-0.693359375f), x);
  r = NAME(fma)(n, NAME(all)(2.12194440e-4f), r);
  V y = NAME(all)(1.9875691500e-4f);
  y = NAME(fma)(y, r, NAME(all)(1.3981999507e-3f));
  y = NAME(fma)(y, r, NAME(all)(8.3334519073e-3f));
  y = NAME(fma)(y, r, NAME(all)(4.1665795894e-2f));
  y = NAME(fma)(y, r, NAME(all)(1.6666665459e-1f));
  y = NAME(fma)(y, r, NAME(all)(5.0000001201e-1f));
  y = NAME(fma)(y, r * r, r + NAME(all)(1.0f));
  return NAME(scale)(y, n);
}

/* x * (1 + erf(x / sqrt(2))) / 2; erf by Abramowitz and Stegun 7.1.26, to 1.5e-7, as PyTorch's. */
INLINE V NAME(gelu_of)(V x) {
  V scaled = x * NAME(all)(0.70710678118654752f), size = NAME(max)(scaled, -scaled);
  V t = NAME(all)(1.0f) / NAME(fma)(NAME(all)(0.3275911f), size, NAME(all)(1.0f));
  V p = NAME(all)(1.061405429f);
  p = NAME(fma)(p, t, NAME(all)(-1.453152027f));
  p = NAME(fma)(p, t, NAME(all)(1.421413741f));
  p = NAME(fma)(p, t, NAME(all)(-0.284496736f));
  p = NAME(fma)(p, t, NAME(all)(0.254829592f));
  V tail = p * t * NAME(exp)(-size * size); /* 1 - erf(size) */
  V half = x * NAME(all)(0.5f);
  return NAME(if_negative)(x, half * tail, half * (NAME(all)(2.0f) - tail));
}

/* gelu of `count` values, in place. */
static void NAME(gelu)(void *values, int64_t at, int64_t count, int dtype) {
  int64_t i = at, end = at + count;
#define AS(type)                                                                                                 \
  for (; i + LANES <= end; i += LANES) NAME(store)(values, i, NAME(gelu_of)(NAME(load)(values, i, type)), type); \
  if (i < end)                                                                                                   \
    NAME(store_some)(values, i, end - i, NAME(gelu_of)(NAME(load_some)(values, i, end - i, type)), type)
  if (dtype == FLOAT32) { AS(FLOAT32); }
  else if (dtype == BFLOAT16) { AS(BFLOAT16); }
  else { AS(FLOAT16); }
#undef AS
}

/* total += weight * values, of `count` values; product and sum are rounded one by one. */
static void NAME(add)(float *total, const void *values, float weight, int64_t count, int dtype) {
  int64_t i = 0;
#define AS(which)                                                                                                      \
  {                                                                                                                    \
    const int type = which;                                                                                            \
    for (; i + LANES <= count; i += LANES)                                                                             \
      NAME(store)(total, i, NAME(load)(total, i, FLOAT32) + NAME(all)(weight) * NAME(load)(values, i, type), FLOAT32); \
    for (; i < count; i++) {                                                                                           \
      float product = weight * to_float(values, i, type);                                                              \
      total[i] += product;                                                                                             \
    }                                                                                                                  \
  }
  if (dtype == FLOAT32) AS(FLOAT32)
  else if (dtype == BFLOAT16) AS(BFLOAT16)
  else AS(FLOAT16)
#undef AS
}

/* float32 -> `count` values of dtype */
static void NAME(narrow)(void *to, const float *from, int64_t count, int dtype) {
  int64_t i = 0;
#define AS(type)                                                                                 \
  for (; i + LANES <= count; i += LANES) NAME(store)(to, i, NAME(load)(from, i, FLOAT32), type); \
  for (; i < count; i++) from_float(to, i, from[i], type)
  if (dtype == FLOAT32) { AS(FLOAT32); }
  else if (dtype == BFLOAT16) { AS(BFLOAT16); }
  else { AS(FLOAT16); }
#undef AS
}

static const struct tiles NAME(tiles) = {NAME(linear), NAME(widen), NAME(gelu), NAME(add), NAME(narrow)};

#undef NAME
#undef NAME_
#undef NAME__
#undef SET
#undef LANES
#undef ROWS
#undef INLINE_ROWS
#undef V
