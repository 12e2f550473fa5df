/* Numbers of 16 bits, one by one, and vectors of four numbers. */

INLINE float of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float to_float(const void *from, int64_t at, const int dtype) {
  if (dtype == FLOAT32) {
    float value;
    memcpy(&value, (const float *)from + at, sizeof value);
    return value;
  }
  uint16_t half;
  memcpy(&half, (const uint16_t *)from + at, sizeof half);
  if (dtype == BFLOAT16) return of_bits((uint32_t)half << 16); /* the upper half of a float32 */
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return of_bits(sign | 0x7f800000 | rest); /* infinite, or not a number */
  return of_bits(sign | to_bits(of_bits(rest) * 0x1p112f)); /* the exponents' biases differ by 112 */
}

INLINE void from_float(void *to, int64_t at, float value, const int dtype) {
  if (dtype == FLOAT32) {
    memcpy((float *)to + at, &value, sizeof value);
    return;
  }
  uint32_t bits = to_bits(value), sign = bits & 0x80000000, rest = bits ^ sign, half;
  if (dtype == BFLOAT16) {
    if (value != value) half = 0x7fc0; /* rounding could carry a NaN away */
    else half = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to the nearest, ties to even */
  } else if (rest > 0x7f800000) {
    half = sign >> 16 | 0x7e00;
  } else if (rest >= 0x47800000) { /* 2 to the 16 and above */
    half = sign >> 16 | 0x7c00;
  } else if (rest < 0x38800000) { /* below 2 to the -14: the last bits are those of a sum with 0.5 */
    half = sign >> 16 | (to_bits(of_bits(rest) + 0.5f) - to_bits(0.5f));
  } else {
    half = sign >> 16 | (rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13;
  }
  uint16_t stored = (uint16_t)half;
  memcpy((uint16_t *)to + at, &stored, sizeof stored);
}

INLINE quarter at_least_zero(quarter value) { /* a NaN stays one */
  for (int l = 0; l < 4; l++) value[l] = value[l] < 0 ? 0 : value[l];
  return value;
}
