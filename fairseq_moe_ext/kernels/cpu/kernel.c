/* The experts' feed-forward for few rows per expert: what a matrix library does slowest, since it lays out a weight
   anew for every product. Here a weight is read once, in its own order, four of its rows at a time, which stay in the
   cache for all rows of the expert; what comes next is fetched meanwhile (tiles.h). An expert's hidden features stay in
   the cache, too. Any number of threads share one expert: they take blocks of output features, every output is one sum
   in one order, and so the same bit by bit whatever is computed beside it, by however many threads.

   Called by cpu_kernel.py; C11 of GCC or clang, without Python or PyTorch. Threads are PyTorch's own: `parallel` is the
   function by which its OpenMP library starts a team.

   Legend: K = input features, F = hidden features, n = rows of one expert. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__unix__)
#include <sched.h>
#endif

#define VERSION 10   /* of what cpu_kernel.py passes; another one is not called */
#define FEATURES 4   /* weight rows at a time */
#define AHEAD 8      /* weight rows between the ones in use and the ones that are fetched */
#define PART 1024    /* inputs at a time, of which FEATURES weight rows stay in the first cache for many rows */
#define WIDEN_ROWS 8 /* up to so many rows 16-bit weights are widened where they are used, once per tile */

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* cpu_kernel.py's DTYPES */
enum { NONE, RELU, GELU };           /* its ACTIVATIONS */
enum { PLAIN, AVX2, AVX512 };        /* its INSTRUCTIONS */
#define SIZE(dtype) ((dtype) == FLOAT32 ? 4 : 2)

typedef float quarter __attribute__((vector_size(16)));

struct tiles {
  void (*linear)(const float *const *, int64_t, const void *, const void *, void *, int64_t, int64_t, int64_t, int64_t,
                 char *, float *, int, int);
  void (*widen)(float *, const void *, int64_t, int);
  void (*gelu)(void *, int64_t, int64_t, int);
  void (*add)(float *, const void *, float, int64_t, int);
  void (*narrow)(void *, const float *, int64_t, int);
};

#include "numbers.h"
#include "plain.h"
#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#endif

static const struct tiles *tiles_of(int64_t instructions) {
#if defined(__x86_64__)
  if (instructions == AVX512) return &tiles_avx512;
  if (instructions == AVX2) return &tiles_avx2;
#endif
  (void)instructions;
  return &tiles_plain;
}

#include "routing.h"

#include "sharing.h"

/* ---- what a call computes */

/* One linear layer of every expert: weight (S, M, K) and bias (S, M), contiguous. */
struct layer {
  const char *weight, *bias;
  int64_t inputs, outputs;
  int64_t activation;
};

/* The experts' rows of x, each through the weights in the expert's slot, into rows of out: one layer, or two.
   x (num_rows, K) and out (num_outputs, M) are contiguous, all of one dtype. */
struct call {
  struct groups groups;
  struct team team;
  int64_t instructions, dtype, layers;
  const char *x;
  char *out;
  struct layer layer[2];
};

#define SUMS (FEATURES * 64) /* bytes of a row's sums, of the longest vectors */

/* Features of one layer that one thread computes at a time. */
static int64_t block_of(const struct call *call, int layer) {
  int64_t m = call->layer[layer].outputs, k = call->layer[layer].inputs, size = SIZE(call->dtype);
  if (call->team.threads < 2 || !call->team.parallel) return m;
  int64_t least = call->dtype == FLOAT32 ? 16 : 64; /* rows are widened once a block */
  int64_t block = parts(larger(BLOCK_BYTES / (k * size), least), 16) * 16;
  return smaller(block, larger(parts(parts(m, call->team.threads), 16) * 16, 16));
}

/* One block of features of one layer. kept: the hidden features. */
static void compute(const struct work *work, const struct expert *expert, int stage, int64_t block, char *kept,
                    char *scratch) {
  const struct call *call = work->call;
  const struct tiles *tiles = tiles_of(call->instructions);
  const struct layer *its = &call->layer[stage];
  int64_t n = expert->rows, slot = expert->slot;
  int64_t k = its->inputs, m = its->outputs, size = SIZE(call->dtype);
  char *out = stage + 1 < call->layers ? kept : call->out + expert->target * m * size;
  const float **rows = (const float **)scratch;
  char *sums = scratch + lines(work->longest * sizeof *rows);
  float *panel = (float *)(sums + work->longest * SUMS), *wide = panel + FEATURES * PART;
  for (int64_t row = 0; row < n; row++) {
    const char *x = stage ? kept + row * k * size : call->x + row_of(&call->groups, expert, row) * k * size;
    rows[row] = call->dtype == FLOAT32 ? (const float *)x : wide + row * k;
    if (call->dtype != FLOAT32) tiles->widen(wide + row * k, x, k, call->dtype);
  }
  int64_t first = block * block_of(call, stage), end = smaller(first + block_of(call, stage), m);
  tiles->linear(rows, n, its->weight + slot * m * k * size, its->bias + slot * m * size, out, m, k, first, end, sums,
                panel, its->activation == RELU, call->dtype);
  if (its->activation == GELU)
    for (int64_t row = 0; row < n; row++) tiles->gelu(out, row * m + first, end - first, call->dtype);
}

#include "quantized.h"

#include "quantizing.h"

#include "touching.h"

int64_t cpu_kernel_version(void) { return VERSION; }

/* The best instructions that this CPU has, and its system lets it use. */
int64_t best_instructions(void) {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  int has_f16c = __get_cpuid(1, &a, &b, &c, &d) && c & 1u << 29; /* by a name that not all compilers know */
  int has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (has_avx2) return AVX2;
#endif
  return PLAIN;
}

/* 0; -1 where there is no memory for what is kept meanwhile; -2 where an expert is not inside. */
int64_t run_experts(const struct call *call) {
  struct work work = {.groups = &call->groups, .call = call, .compute = compute, .stages = call->layers};
  int64_t error = count_rows(&work), widest = 0;
  if (error || !work.active) return error;
  for (int layer = 0; layer < call->layers; layer++) {
    widest = larger(widest, call->layer[layer].inputs);
    work.blocks[layer] = parts(call->layer[layer].outputs, block_of(call, layer));
  }
  if (call->layers > 1) work.kept_bytes = lines(work.longest * call->layer[0].outputs * SIZE(call->dtype));
  int64_t wide = call->dtype == FLOAT32 ? 0 : (FEATURES * PART + work.longest * widest) * sizeof(float);
  work.scratch_bytes = lines(lines(work.longest * sizeof(float *)) + work.longest * SUMS + wide);
  return run_work(&work, &call->team);
}
