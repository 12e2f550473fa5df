/* Experts of int8 or int4 weights, as block.py lays them out, on rows that are quantised alike at every number of rows.

   A row's group of GROUP inputs is quantised by its largest size, the last group padded with zeros. Products of a group
   are summed as integers, which is exact; groups are added up one after another by FMA in float32 (a product and a sum
   where there is none). So a row's outputs have the same bits whatever is computed beside it, and on every set of
   instructions that has FMA. Hidden features are quantised, too, group by group, by the thread that computed them.

   Legend: K = input features, G = groups of a row, M = output features, n = rows of one expert. */

#define GROUP 64
#define TILE_ROWS 4      /* rows at a time */
#define SOME_GROUPS 16   /* that one thread quantises at a time */
#define MOST_OUTPUTS 256 /* that one thread computes at a time, a multiple of GROUP */

/* n rows. excess: by how much a group's sum of products comes out too high, since weights are read with an offset. */
struct quantized_rows {
  int8_t *codes; /* (n, G, GROUP), rows `stride` bytes apart */
  float *scales; /* (n, G) */
  int32_t *excess;
  int64_t groups, stride;
};

typedef int32_t integers __attribute__((vector_size(16)));
INLINE integers four_integers(int32_t value) { return (integers){value, value, value, value}; }

/* What a set of instructions does. */
struct products {
  /* GROUP inputs -> their codes and scale; gives the codes' sum */
  int32_t (*quantize)(const float *, int8_t *, float *);
  /* scales of FEATURES weight rows, float16 (G,) each -> float32 (G, FEATURES) */
  void (*widen)(const char *const *, int64_t, float *);
  /* totals of `rows` (to TILE_ROWS) rows from `row` on with FEATURES weight rows of `bits`; what lies `ahead` bytes
     after these is fetched meanwhile, 0: nothing */
  void (*tile)(const struct quantized_rows *, int64_t row, int64_t rows, const char *const *, int64_t ahead,
               const float *scales, quarter *totals, int64_t bits);
  int32_t offset8, offset4; /* of weights of 8 and 4 bits, as they are read */
};

/* A group without a number or with an infinity gets the scale NaN: all outputs of its row become NaN, no others. */
INLINE int32_t quantize_group(const float *x, int8_t *codes, float *scale) {
  uint32_t largest = 0; /* sizes are ordered as their bits */
  for (int i = 0; i < GROUP; i++) {
    uint32_t size = to_bits(x[i]) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  float most = of_bits(largest);
  if (largest >= 0x7f800000 || most < 1e-30f) { /* beyond which 127 / most is infinite */
    memset(codes, 0, GROUP);
    *scale = largest >= 0x7f800000 ? of_bits(0x7fc00000) : 0;
    return 0;
  }
  float factor = 127.0f / most;
  int32_t sum = 0;
  for (int i = 0; i < GROUP; i++) { /* the sum's last bits are the product to the nearest, ties to even: -127 to 127 */
    float product = x[i] * factor;
    codes[i] = (int8_t)to_bits(product + 12582912.0f);
  }
  for (int i = 0; i < GROUP; i++) sum += codes[i];
  *scale = most / 127.0f;
  return sum;
}

#include "quantized_plain.h"
#if defined(__x86_64__)
#include "quantized_avx2.h"
#include "quantized_vnni.h"
#endif

int has_vnni(void) {
#if defined(__x86_64__)
  return HAS_VNNI;
#else
  return 0;
#endif
}

static const struct products *products_of(int64_t instructions) {
#if defined(__x86_64__)
  if (instructions == AVX512 && has_vnni()) return &products_vnni;
  if (instructions != PLAIN) return &products_avx2;
#endif
  (void)instructions;
  return &products_plain;
}

/* ---- what a call computes */

/* One linear layer of every expert, in slot 0 and then every slot_bytes: codes (M, G, 8 * bits bytes), scales (M, G)
   float16, units (M,) and bias (M,) float32. */
struct quantized_layer {
  const char *codes, *scales, *units, *bias;
  int64_t slot_bytes, inputs, outputs, activation;
};

/* As struct call has it; x and out are each of a dtype. */
struct quantized_call {
  struct groups groups;
  struct team team;
  int64_t instructions, bits, in_dtype, out_dtype, layers;
  const char *x;
  char *out;
  struct quantized_layer layer[2];
};

static int64_t quantized_bytes(int64_t n, int64_t features) {
  int64_t groups = parts(features, GROUP);
  return n * (groups + 1) * GROUP + 2 * lines(n * groups * sizeof(float));
}

/* Rows apart by one line more than they take: else the same group of many rows would fall into one set of the cache. */
static struct quantized_rows rows_in(char *memory, int64_t n, int64_t features) {
  int64_t groups = parts(features, GROUP), stride = (groups + 1) * GROUP;
  char *scales = memory + n * stride;
  return (struct quantized_rows){(int8_t *)memory, (float *)scales,
                                 (int32_t *)(scales + lines(n * groups * sizeof(float))), groups, stride};
}

static void quantize_into(const struct quantized_rows *to, int64_t row, int64_t group, const float *values,
                          const struct quantized_call *call) {
  const struct products *products = products_of(call->instructions);
  int64_t at = row * to->groups + group;
  int32_t sum = products->quantize(values, to->codes + row * to->stride + group * GROUP, to->scales + at);
  to->excess[at] = sum * (call->bits == 4 ? products->offset4 : products->offset8);
}

/* Features of one layer that one thread computes at a time: whole groups of the next layer's inputs. */
static int64_t outputs_of(const struct quantized_call *call, const struct quantized_layer *its) {
  int64_t row_bytes = parts(its->inputs, GROUP) * (8 * call->bits + 2);
  int64_t wanted = parts(BLOCK_BYTES / row_bytes, GROUP), share = parts(parts(its->outputs, call->team.threads), GROUP);
  return larger(smaller(smaller(wanted, share) * GROUP, MOST_OUTPUTS), GROUP);
}

/* Outputs `first` to before `end` of n rows -> values (n, stride); up to FEATURES - 1 after them are written, too.
   scales: FEATURES * G float32; totals: n. */
static void multiply(const struct quantized_call *call, const struct quantized_layer *its, int64_t slot,
                     const struct quantized_rows *x, int64_t n, int64_t first, int64_t end, float *values,
                     int64_t stride, float *scales, quarter *totals) {
  const struct products *products = products_of(call->instructions);
  int64_t start = slot * its->slot_bytes, row_bytes = x->groups * 8 * call->bits, scale_bytes = x->groups * 2;
  for (int64_t feature = first; feature < end; feature += FEATURES) {
    int64_t count = smaller(FEATURES, end - feature);
    const char *weight[FEATURES], *its_scales[FEATURES];
    quarter units = {0}, bias = {0};
    for (int f = 0; f < FEATURES; f++) { /* the last one again where there are fewer */
      int64_t at = feature + smaller(f, count - 1);
      weight[f] = its->codes + start + at * row_bytes;
      its_scales[f] = its->scales + start + at * scale_bytes;
      units[f] = to_float(its->units + start, at, FLOAT32);
      bias[f] = to_float(its->bias + start, at, FLOAT32);
    }
    products->widen(its_scales, x->groups, scales);
    for (int64_t row = 0; row < n;) { /* in parts of one size, or one less */
      int64_t left = n - row, size = parts(left, parts(left, TILE_ROWS));
      products->tile(x, row, size, weight, row ? 0 : AHEAD * row_bytes, scales, totals + row, call->bits);
      row += size;
    }
    for (int64_t row = 0; row < n; row++) {
      quarter value = units * totals[row] + bias;
      if (its->activation == RELU) value = at_least_zero(value);
      memcpy(values + row * stride + feature - first, &value, sizeof value);
    }
  }
}

/* Some groups of the rows; or one block of features of one layer. kept: quantised rows and hidden features. */
static void compute_quantized(const struct work *work, const struct expert *expert, int stage, int64_t block,
                              char *kept, char *scratch) {
  const struct quantized_call *call = work->call;
  const struct tiles *tiles = tiles_of(call->instructions);
  const struct quantized_layer *its = &call->layer[stage ? stage - 1 : 0];
  int64_t n = expert->rows, k = call->layer[0].inputs, m = its->outputs;
  /* at the same place for every number of rows: an expert's first stage runs while another's last one reads its hidden */
  char *behind = kept + quantized_bytes(work->longest, k);
  struct quantized_rows x = rows_in(kept, n, k), hidden = rows_in(behind, n, call->layer[0].outputs);
  if (!stage) {
    int64_t end = smaller((block + 1) * SOME_GROUPS, x.groups);
    for (int64_t row = 0; row < n; row++) {
      const char *from = call->x + row_of(&call->groups, expert, row) * k * SIZE(call->in_dtype);
      for (int64_t group = block * SOME_GROUPS; group < end; group++) {
        float values[GROUP] = {0};
        int64_t count = smaller(GROUP, k - group * GROUP);
        const char *at = from + group * GROUP * SIZE(call->in_dtype);
        if (call->in_dtype == FLOAT32) memcpy(values, at, count * sizeof *values);
        else tiles->widen(values, at, count, call->in_dtype);
        quantize_into(&x, row, group, values, call);
      }
    }
    return;
  }
  int64_t outputs = outputs_of(call, its), first = block * outputs, end = smaller(first + outputs, m);
  float *values = (float *)scratch, *scales = values + work->longest * MOST_OUTPUTS;
  quarter *totals = (quarter *)(scratch + work->scratch_bytes - lines(work->longest * sizeof *totals));
  multiply(call, its, expert->slot, stage == 1 ? &x : &hidden, n, first, end, values, outputs, scales, totals);
  for (int64_t row = 0; row < n; row++) {
    float *its_values = values + row * outputs;
    if (its->activation == GELU) tiles->gelu(its_values, 0, end - first, FLOAT32);
    if (stage == call->layers) {
      tiles->narrow(call->out + ((expert->target + row) * m + first) * SIZE(call->out_dtype), its_values, end - first,
                    call->out_dtype);
      continue;
    }
    for (int64_t i = end - first; i % GROUP; i++) its_values[i] = 0;
    for (int64_t i = 0; i < end - first; i += GROUP) quantize_into(&hidden, row, (first + i) / GROUP, its_values + i, call);
  }
}

/* As run_experts. */
int64_t run_quantized(const struct quantized_call *call) {
  struct work work = {.groups = &call->groups, .call = call, .compute = compute_quantized, .stages = 1 + call->layers};
  int64_t error = count_rows(&work), widest = 0;
  if (error || !work.active) return error;
  work.blocks[0] = parts(parts(call->layer[0].inputs, GROUP), SOME_GROUPS);
  for (int layer = 0; layer < call->layers; layer++) {
    const struct quantized_layer *its = &call->layer[layer];
    work.blocks[1 + layer] = parts(its->outputs, outputs_of(call, its));
    work.kept_bytes += quantized_bytes(work.longest, its->inputs);
    widest = larger(widest, its->inputs);
  }
  work.scratch_bytes = lines((work.longest * MOST_OUTPUTS + FEATURES * parts(widest, GROUP)) * sizeof(float)) +
                       lines(work.longest * sizeof(quarter));
  return run_work(&work, &call->team);
}
