/* One row of weights, quantised: compiled once for every set of instructions. quantizing.h includes this with SET (the
   names' suffix), LANES and V (a vector of so many float32), beside functions of SET in avx2.h or plain.h. */

#define NAME__(name, set) name##_##set
#define NAME_(name, set) NAME__(name, set)
#define NAME(name) NAME_(name, SET)
#define VECTORS (SUM_LANES / LANES)

/* The sums over all lanes of AT_ONCE numbers. */
INLINE quarter NAME(sums_of_lanes)(V lanes[VECTORS][AT_ONCE]) {
  quarter total = NAME(sums)(lanes[0]);
  for (int part = 1; part < VECTORS; part++) total += NAME(sums)(lanes[part]);
  return total;
}

/* A group -> its scale: of the candidates, each with the scale that fits its codes best, the one with the least error.
   costs: of errors in its inputs, or NULL. */
INLINE float NAME(search)(const struct quantizing *call, const float *group, float largest, const float *costs) {
  float step = -1.0f / largest, best = 0, scale = -largest / 8;
  if (largest == 0) return scale;
  step = step < -HUGE_STEP ? -HUGE_STEP : step > HUGE_STEP ? HUGE_STEP : step;
  const V least = NAME(all)(-8.0f), most = NAME(all)(7.0f);
  for (int64_t candidate = 0; candidate < call->num_candidates; candidate += AT_ONCE) {
    V steps[AT_ONCE], with_weights[VECTORS][AT_ONCE], with_codes[VECTORS][AT_ONCE];
    for (int c = 0; c < AT_ONCE; c++) { /* the last one again where there are fewer: it is no better then */
      steps[c] = NAME(all)(step * call->candidates[smaller(candidate + c, call->num_candidates - 1)]);
      for (int part = 0; part < VECTORS; part++) with_weights[part][c] = with_codes[part][c] = NAME(zero)();
    }
    for (int i = 0; i < GROUP; i += SUM_LANES)
      for (int part = 0; part < VECTORS; part++) {
        V value = NAME(load)(group, i + part * LANES, FLOAT32), weighted = value, cost = value;
        if (costs) {
          cost = NAME(load)(costs, i + part * LANES, FLOAT32);
          weighted = value * cost;
        }
        for (int c = 0; c < AT_ONCE; c++) {
          V code = NAME(round)(NAME(min)(NAME(max)(value * steps[c], least), most));
          with_weights[part][c] += code * weighted;
          if (costs) with_codes[part][c] += code * code * cost;
          else with_codes[part][c] = NAME(fma)(code, code, with_codes[part][c]);
        }
      }
    quarter weights = NAME(sums_of_lanes)(with_weights), codes = NAME(sums_of_lanes)(with_codes);
    for (int c = 0; c < AT_ONCE; c++) codes[c] = codes[c] < TINY ? TINY : codes[c];
    quarter fitting = weights / codes, gain = fitting * weights; /* by so much the error is less than that of zeros */
    for (int c = 0; c < AT_ONCE; c++)
      if (gain[c] > best) {
        best = gain[c];
        scale = fitting[c];
      }
  }
  return scale;
}

/* The number of largest size, the first of several. */
INLINE float NAME(largest_of)(const float *group, float size) {
  V least = NAME(all)(0), most = least;
  for (int i = 0; i < GROUP; i += LANES) {
    V value = NAME(load)(group, i, FLOAT32);
    least = NAME(min)(least, value);
    most = NAME(max)(most, value);
  }
  float below = 0, above = 0;
  for (int l = 0; l < LANES; l++) {
    below = least[l] < below ? least[l] : below;
    above = most[l] > above ? most[l] : above;
  }
  if (above != -below) return above == size ? size : -size;
  for (int i = 0; i < GROUP; i++)
    if (group[i] == above || group[i] == below) return group[i];
  return 0;
}

/* A group -> its codes, the nearest whole numbers under its scale. */
INLINE void NAME(write_codes)(const float *group, float step, uint8_t *codes, const int bits) {
  const V least = NAME(all)(bits == 8 ? -127.0f : -8.0f), most = NAME(all)(bits == 8 ? 127.0f : 7.0f);
  uint32_t numbers[GROUP];
  for (int i = 0; i < GROUP; i += LANES) {
    V value = NAME(load)(group, i, FLOAT32) / NAME(all)(step);
    NAME(store)(numbers, i, NAME(min)(NAME(max)(value, least), most) + NAME(all)(ROUNDER), FLOAT32);
  }
  if (bits == 8)
    for (int i = 0; i < GROUP; i++) codes[i] = (uint8_t)numbers[i];
  else
    for (int i = 0; i < GROUP / 2; i++)
      codes[i] = (uint8_t)(((numbers[i] + 8) & 15) | (numbers[i + GROUP / 2] + 8) << 4);
}

INLINE int NAME(quantize_by)(const struct quantizing *call, int64_t row, char *scratch, const int bits) {
  const int64_t inputs = call->inputs, groups = parts(inputs, GROUP);
  float *values = (float *)scratch, *sizes = values + groups * GROUP, *wanted = sizes + groups;
  const char *from = call->weight + row * call->stride * SIZE(call->dtype);
  if (call->dtype == FLOAT32) memcpy(values, from, inputs * sizeof *values);
  else NAME(widen)(values, from, inputs, (int)call->dtype);
  for (int64_t i = inputs; i < groups * GROUP; i++) values[i] = 0;
  int32_t most = 0; /* sizes are ordered as their bits */
  for (int64_t g = 0; g < groups; g++) {
    int32_t its = 0;
    for (int i = 0; i < GROUP; i++) {
      int32_t size = (int32_t)(to_bits(values[g * GROUP + i]) & 0x7fffffff);
      its = size > its ? size : its;
    }
    sizes[g] = of_bits((uint32_t)its);
    most = its > most ? its : most;
  }
  if (most >= 0x7f800000) return 1;
  /* from here on with the row's largest size from 0.5 to 1, so that squares neither overflow nor vanish: in two steps,
     since 2 to the 149 is no float32 */
  const int exponent = exponent_of(of_bits((uint32_t)most)), half = exponent >> 1;
  const float first = power(-half), second = power(half - exponent);
  for (int64_t i = 0; i < groups * GROUP; i++) values[i] = values[i] * first * second;
  float widest = 0;
  for (int64_t g = 0; g < groups; g++) {
    float size = sizes[g] * first * second, *group = values + g * GROUP;
    const float *costs = call->columns ? call->columns + g * GROUP : NULL;
    if (bits == 8) wanted[g] = size / 127.0f;
    else if (costs) wanted[g] = NAME(search)(call, group, NAME(largest_of)(group, size), costs);
    else wanted[g] = NAME(search)(call, group, NAME(largest_of)(group, size), NULL);
    float scale = wanted[g] < 0 ? -wanted[g] : wanted[g];
    widest = scale > widest ? scale : widest;
  }
  int own = exponent_of(widest) - 1, unit = 0;
  if (widest != 0) {
    own += to_half_and_back(widest * power(-own)) == 2.0f; /* rounded up */
    unit = own + exponent < LEAST_EXPONENT ? LEAST_EXPONENT : own + exponent;
  }
  from_float(call->units, row, power(unit), FLOAT32);
  uint8_t *codes = (uint8_t *)call->codes + row * groups * 8 * bits;
  for (int64_t g = 0; g < groups; g++, codes += 8 * bits) {
    from_float(call->scales, row * groups + g, wanted[g] * power(exponent - unit), FLOAT16);
    float step = to_float(call->scales, row * groups + g, FLOAT16) * power(unit - exponent);
    if (step == 0) memset(codes, bits == 8 ? 0 : 0x88, 8 * bits);
    else NAME(write_codes)(values + g * GROUP, step, codes, bits);
  }
  return 0;
}

/* 0, or 1 where a weight is a NaN or infinite. scratch: as many bytes as quantize_weight says. */
static int NAME(quantize_row)(const struct quantizing *call, int64_t row, char *scratch) {
  return call->bits == 8 ? NAME(quantize_by)(call, row, scratch, 8) : NAME(quantize_by)(call, row, scratch, 4);
}

#undef VECTORS
#undef NAME
#undef NAME_
#undef NAME__
#undef SET
#undef LANES
#undef V
