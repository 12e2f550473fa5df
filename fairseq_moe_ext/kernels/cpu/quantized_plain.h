/* What quantized_tile.h is made of on every CPU. */

#define SET plain
#define OFFSET8 0
#define W struct weights_plain
struct weights_plain {
  const char *at[FEATURES];
};
INLINE struct weights_plain read_weights_plain(const char *const *weight, int64_t at, int64_t ahead,
                                                         const int bits) {
  struct weights_plain found;
  (void)ahead;
  (void)bits;
  for (int f = 0; f < FEATURES; f++) found.at[f] = weight[f] + at;
  return found;
}
INLINE integers dot_plain(const int8_t *x, const struct weights_plain *weights, const int bits) {
  integers sums;
  for (int f = 0; f < FEATURES; f++) {
    const uint8_t *its = (const uint8_t *)weights->at[f];
    int32_t sum = 0;
    if (bits == 8)
      for (int i = 0; i < GROUP; i++) sum += x[i] * (int8_t)its[i];
    else
      for (int i = 0; i < GROUP / 2; i++) sum += x[i] * (its[i] & 15) + x[GROUP / 2 + i] * (its[i] >> 4);
    sums[f] = sum;
  }
  return sums;
}
static void widen_scales_plain(const char *const *from, int64_t groups, float *to) {
  for (int64_t g = 0; g < groups; g++)
    for (int f = 0; f < FEATURES; f++) to[FEATURES * g + f] = to_float(from[f], g, FLOAT16);
}
INLINE quarter fma4_plain(quarter a, quarter b, quarter c) { return fma_plain(a, b, c); }
#include "quantized_tile.h"
