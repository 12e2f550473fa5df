/* The experts' feed-forward for few rows per expert: what a matrix library does slowest, since it lays out a weight
   anew for every product. Here a weight is read once, in its own order, four of its rows at a time, which stay in the
   cache for all rows of the expert; what comes next is fetched meanwhile (tiles.h). An expert's hidden features stay in
   the cache, too. Any number of threads share one expert: work is handed out by blocks of output features, every output
   is one sum in one order, and so the same bit by bit whatever is computed beside it, by however many threads.

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

#define VERSION 6    /* of what cpu_kernel.py passes; another one is not called */
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

/* ---- what a call computes */

/* One linear layer of every expert: weight (S, M, K) and bias (S, M), contiguous. */
struct layer {
  const char *weight, *bias;
  int64_t inputs, outputs;
  int64_t activation;
};

/* Expert e's counts[e] rows of x, from row sources[e] on, through the weights in slot slots[e] -> rows targets[e] and
   on of out: one layer, or two. x (num_rows, K) and out (num_outputs, M) are contiguous, all of one dtype. Rows of an
   expert that has more than `most` are left as they are. */
struct call {
  int64_t instructions, dtype, threads, layers, experts, most;
  const int32_t *numbers; /* (4, experts): sources, targets, counts, slots */
  int64_t num_rows, num_outputs, num_slots;
  const char *x;
  char *out;
  struct layer layer[2];
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

static inline const int32_t *counts_of(const struct call *call) { return call->numbers + 2 * call->experts; }

#define RING 4                 /* experts whose hidden features several threads keep at a time */
#define SUMS (FEATURES * 64)   /* bytes of a row's sums, of the longest vectors */
#define BLOCK_BYTES (64 << 10) /* of weights, about, that one thread takes at a time */

/* A call under way. done[layer][expert]: blocks that are computed. */
struct work {
  const struct call *call;
  const struct tiles *tiles;
  int64_t active, longest, widest, blocks[2], block[2], lag, ring, next, started;
  int32_t *expert, *done[2];
  char *hidden, *scratch;
  int64_t scratch_bytes;
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE int64_t lines(int64_t bytes) { return parts(bytes, 64) * 64; }

static void wait_for(const int32_t *counter, int64_t value) {
  for (int64_t spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__unix__)
    if (spins > 1000) sched_yield();
#endif
  }
}

/* One block of features of one layer of the expert that is the `number`th to have rows. */
static void compute(const struct work *work, int64_t number, int layer, int64_t block, char *scratch) {
  const struct call *call = work->call;
  const struct layer *its = &call->layer[layer];
  int64_t expert = work->expert[number], n = counts_of(call)[expert], slot = call->numbers[3 * call->experts + expert];
  int64_t k = its->inputs, m = its->outputs, size = SIZE(call->dtype);
  char *hidden = work->hidden + (number % work->ring) * lines(work->longest * call->layer[0].outputs * size);
  const char *x = layer ? hidden : call->x + call->numbers[expert] * k * size;
  char *out = layer + 1 < call->layers ? hidden : call->out + call->numbers[call->experts + expert] * m * size;
  const float **rows = (const float **)scratch;
  char *sums = scratch + lines(work->longest * sizeof *rows);
  float *panel = (float *)(sums + work->longest * SUMS), *wide = panel + FEATURES * PART;
  if (call->dtype != FLOAT32) work->tiles->widen(wide, x, n * k, call->dtype);
  for (int64_t row = 0; row < n; row++) rows[row] = (call->dtype == FLOAT32 ? (const float *)x : wide) + row * k;
  int64_t first = block * work->block[layer], end = smaller(first + work->block[layer], m);
  work->tiles->linear(rows, n, its->weight + slot * m * k * size, its->bias + slot * m * size, out, m, k, first, end,
                      sums, panel, its->activation == RELU, call->dtype);
  if (its->activation == GELU)
    for (int64_t row = 0; row < n; row++) work->tiles->gelu(out, row * m + first, end - first, call->dtype);
}

/* One thread's share. Blocks are handed out in order: the first layer of an expert, then the second of one that came
   `lag` experts before, for which all blocks of the first were handed out by then. Nobody waits for what comes
   later. */
static void share(void *of) {
  struct work *work = of;
  char *scratch = work->scratch + __atomic_fetch_add(&work->started, 1, __ATOMIC_RELAXED) * work->scratch_bytes;
  int64_t per_step = work->blocks[0] + work->blocks[1], items = (work->active + work->lag) * per_step;
  for (;;) {
    int64_t item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (item >= items) return;
    int64_t block = item % per_step, number = item / per_step;
    int layer = block >= work->blocks[0];
    if (layer) {
      block -= work->blocks[0];
      number -= work->lag;
    }
    if (number < 0 || number >= work->active) continue;
    if (layer) wait_for(&work->done[0][number], work->blocks[0]);
    else if (work->blocks[1] && number >= work->ring) wait_for(&work->done[1][number - work->ring], work->blocks[1]);
    compute(work, number, layer, block, scratch);
    __atomic_fetch_add(&work->done[layer][number], 1, __ATOMIC_RELEASE);
  }
}

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

/* Whether an expert's rows, its outputs and its weights lie where there are some. */
static int is_inside(const struct call *call, int64_t expert) {
  const int32_t *numbers = call->numbers + expert;
  int64_t source = numbers[0], target = numbers[call->experts], count = numbers[2 * call->experts];
  int64_t slot = numbers[3 * call->experts];
  return 0 <= source && source + count <= call->num_rows && 0 <= target && target + count <= call->num_outputs &&
         0 <= slot && slot < call->num_slots;
}

/* 0; -1 where there is no memory for what is kept meanwhile; -2 where an expert is not inside. */
int64_t run_experts(const struct call *call) {
  struct work work = {.call = call, .tiles = tiles_of(call->instructions)};
  int64_t size = SIZE(call->dtype), threads = call->parallel ? call->threads : 1;
  for (int64_t expert = 0; expert < call->experts; expert++)
    if (0 < counts_of(call)[expert] && counts_of(call)[expert] <= call->most) {
      if (!is_inside(call, expert)) return -2;
      work.active++;
      work.longest = larger(work.longest, counts_of(call)[expert]);
    }
  if (!work.active) return 0;
  for (int layer = 0; layer < call->layers; layer++) {
    int64_t m = call->layer[layer].outputs, k = call->layer[layer].inputs;
    work.widest = larger(work.widest, k);
    work.block[layer] = m;
    if (threads > 1) {
      int64_t least = call->dtype == FLOAT32 ? 16 : 64; /* rows are widened once a block */
      int64_t block = parts(larger(BLOCK_BYTES / (k * size), least), 16) * 16;
      work.block[layer] = smaller(block, larger(parts(parts(m, threads), 16) * 16, 16));
    }
    work.blocks[layer] = parts(m, work.block[layer]);
  }
  work.lag = threads > 1 && call->layers > 1; /* so that nobody waits for an expert's last block */
  work.ring = threads > 1 ? RING : 1;
  threads = smaller(threads, work.active * larger(work.blocks[0], work.blocks[1]));
  int64_t lists = lines(3 * work.active * sizeof(int32_t));
  int64_t hidden = call->layers > 1 ? work.ring * lines(work.longest * call->layer[0].outputs * size) : 0;
  int64_t wide = call->dtype == FLOAT32 ? 0 : (FEATURES * PART + work.longest * work.widest) * sizeof(float);
  work.scratch_bytes = lines(lines(work.longest * sizeof(float *)) + work.longest * SUMS + wide);
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, lists + hidden + threads * work.scratch_bytes)) return -1;
  work.expert = (int32_t *)memory;
  work.done[0] = work.expert + work.active;
  work.done[1] = work.done[0] + work.active;
  memset(work.done[0], 0, 2 * work.active * sizeof(int32_t));
  work.hidden = memory + lists;
  work.scratch = work.hidden + hidden;
  for (int64_t expert = 0, number = 0; expert < call->experts; expert++)
    if (0 < counts_of(call)[expert] && counts_of(call)[expert] <= call->most) work.expert[number++] = (int32_t)expert;
  if (threads > 1) call->parallel(share, &work, (unsigned)threads, 0);
  else share(&work);
  free(memory);
  return 0;
}
