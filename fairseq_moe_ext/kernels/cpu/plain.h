/* What tiles.h is made of on every CPU: vectors of four, as the compiler makes them. */

#define SET plain
#define LANES 4
#define ROWS 2
#define INLINE_ROWS 2
#define V quarter
INLINE quarter load_plain(const void *from, int64_t at, const int dtype) {
  quarter value;
  for (int l = 0; l < 4; l++) value[l] = to_float(from, at + l, dtype);
  return value;
}
INLINE void store_plain(void *to, int64_t at, quarter value, const int dtype) {
  for (int l = 0; l < 4; l++) from_float(to, at + l, value[l], dtype);
}
INLINE quarter fma_plain(quarter a, quarter b, quarter c) {
#if defined(__aarch64__)
  return (quarter)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c; /* compiled without contraction */
#endif
}
INLINE quarter zero_plain(void) { return (quarter){0}; }
INLINE quarter all_plain(float value) { return (quarter){value, value, value, value}; }
INLINE quarter sums_plain(const quarter *v) {
  quarter total;
  for (int f = 0; f < 4; f++) total[f] = (v[f][0] + v[f][1]) + (v[f][2] + v[f][3]);
  return total;
}
INLINE quarter load4_plain(const void *from, int64_t at, const int dtype) { return load_plain(from, at, dtype); }
INLINE void store4_plain(void *to, int64_t at, quarter value, const int dtype) { store_plain(to, at, value, dtype); }
INLINE quarter max_plain(quarter a, quarter b) {
  for (int l = 0; l < 4; l++) a[l] = a[l] > b[l] ? a[l] : b[l];
  return a;
}
INLINE quarter round_plain(quarter a) { /* to the nearest, below 2 to the 22 */
  quarter large = all_plain(12582912.0f);
  return (a + large) - large;
}
INLINE quarter scale_plain(quarter a, quarter n) { /* a * 2 to the n */
  for (int l = 0; l < 4; l++) a[l] *= of_bits((uint32_t)((int32_t)n[l] + 127) << 23);
  return a;
}
INLINE quarter if_negative_plain(quarter x, quarter yes, quarter no) {
  for (int l = 0; l < 4; l++) no[l] = x[l] < 0 ? yes[l] : no[l];
  return no;
}
#include "tiles.h"
