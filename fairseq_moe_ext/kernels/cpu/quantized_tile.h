/* A few quantised rows times a few quantised weight rows: the innermost loop of quantized.h, compiled once for every set
   of instructions. quantized_plain.h and its neighbours include this with SET (the names' suffix), OFFSET8 (what is
   added to weights of int8 as they are read; to those of int4 it is 8), W (FEATURES weights' groups as they are read)
   and the functions of SET:

     read_weights   of FEATURES weight rows one group
     dot            a row's group with them -> FEATURES sums
     widen_scales   of FEATURES weight rows, float16 (G,) each -> float32 (G, FEATURES) */

#define NAME__(name, set) name##_##set
#define NAME_(name, set) NAME__(name, set)
#define NAME(name) NAME_(name, SET)

INLINE void NAME(some_rows)(const struct quantized_rows *x, int64_t row, const char *const *weight, int64_t ahead,
                            const float *scales, quarter *totals, const int rows, const int bits) {
  const int64_t groups = x->groups;
  const float *row_scales = x->scales + row * groups;
  const int32_t *excess = x->excess + row * groups;
  const int8_t *codes[TILE_ROWS];
  quarter total[TILE_ROWS];
  for (int r = 0; r < rows; r++) {
    codes[r] = x->codes + (row + r) * x->stride;
    total[r] = (quarter){0};
  }
  for (int64_t g = 0; g < groups; g++) {
    W weights = NAME(read_weights)(weight, g * 8 * bits, ahead, bits);
    for (int r = 0; r < rows; r++) {
      integers sums = NAME(dot)(codes[r] + g * GROUP, &weights, bits);
      if (bits == 4 || OFFSET8 != 0) sums -= four_integers(excess[r * groups + g]);
      quarter scale = NAME(load4)(scales, FEATURES * g, FLOAT32) * all_plain(row_scales[r * groups + g]);
      total[r] = NAME(fma4)(scale, __builtin_convertvector(sums, quarter), total[r]);
    }
  }
  for (int r = 0; r < rows; r++) totals[r] = total[r];
}

static void NAME(quantized_tile)(const struct quantized_rows *x, int64_t row, int64_t rows, const char *const *weight,
                       int64_t ahead, const float *scales, quarter *totals, int64_t bits) {
#define SIZED(rows)                                                                    \
  case rows:                                                                           \
    if (bits == 4) NAME(some_rows)(x, row, weight, ahead, scales, totals, rows, 4);    \
    else NAME(some_rows)(x, row, weight, ahead, scales, totals, rows, 8);              \
    break;
  switch (rows) {
    SIZED(1)
    SIZED(2)
    SIZED(3)
    SIZED(4)
  }
#undef SIZED
}

static int32_t NAME(quantize)(const float *x, int8_t *codes, float *scale) { return quantize_group(x, codes, scale); }

static const struct products NAME(products) = {NAME(quantize), NAME(widen_scales), NAME(quantized_tile), OFFSET8, 8};

#undef NAME
#undef NAME_
#undef NAME__
#undef SET
#undef OFFSET8
#undef W
