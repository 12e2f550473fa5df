/* How threads share the experts of a call. An expert goes through stages, each of some blocks. Of every stage's blocks
   each thread owns a range, always the same one, whose weights can so lie in memory near it; it takes these first, and
   then those that others have not come to. What one stage leaves for the next is kept in the cache. */

#define STAGES 3
#define RING 4                 /* experts whose stages several threads compute at a time */
#define BLOCK_BYTES (64 << 10) /* of weights, about, that one thread takes at a time */

#ifndef TAKEN /* tests see who computes what */
#define TAKEN(thread, stage, number, block)
#endif

/* The rows of experts, as cpu_kernel.py's Groups: those from sources on are read, or where there are ids those with the
   ids from there on; those from targets on are filled. Rows of an expert that has more than `most` are left as they
   are. */
struct groups {
  int64_t experts, most;
  const int32_t *numbers; /* (4, experts): sources, targets, counts, slots */
  const int64_t *ids;     /* (num_ids,), or NULL */
  int64_t num_ids, num_rows, num_outputs, num_slots;
};

struct team {
  int64_t threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* NULL: one thread */
  int (*number)(void); /* of the calling thread in its team; NULL: threads are numbered as they arrive */
};

struct expert {
  int64_t source, target, rows, slot;
};

/* A call under way. done[stage][number]: blocks that are computed of the expert that is the `number`th to have rows.
   taken[stage][number * owners + owner]: how often one of the owner's blocks of it was asked for; its first one is
   firsts[stage][owner], and the next owner's follow behind its last. kept: what `compute` keeps of an expert from stage
   to stage; scratch: what it needs meanwhile, of each thread. */
struct work {
  const struct groups *groups;
  const void *call;
  void (*compute)(const struct work *, const struct expert *, int stage, int64_t block, char *kept, char *scratch);
  int64_t stages, blocks[STAGES], kept_bytes, scratch_bytes;
  int64_t active, longest, lag, ring, owners, started;
  int (*number)(void);
  int32_t *experts, *done[STAGES], *taken[STAGES], *firsts[STAGES];
  char *kept, *scratch;
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
INLINE int64_t lines(int64_t bytes) { return parts(bytes, 64) * 64; }

static struct expert expert_of(const struct groups *groups, int64_t expert) {
  const int32_t *its = groups->numbers + expert;
  int64_t experts = groups->experts;
  return (struct expert){its[0], its[experts], its[2 * experts], its[3 * experts]};
}

static int is_active(const struct groups *groups, const struct expert *its) {
  return 0 < its->rows && its->rows <= groups->most;
}

/* Which of the rows that are read is an expert's `row`th. */
INLINE int64_t row_of(const struct groups *groups, const struct expert *its, int64_t row) {
  return groups->ids ? groups->ids[its->source + row] : its->source + row;
}

/* Whether an expert's rows, its outputs and its weights lie where there are some. */
static int is_inside(const struct groups *groups, const struct expert *its) {
  int64_t end = its->source + its->rows, numbered = groups->ids ? groups->num_ids : groups->num_rows;
  if (its->source < 0 || end > numbered || its->target < 0 || its->target + its->rows > groups->num_outputs ||
      its->slot < 0 || its->slot >= groups->num_slots)
    return 0;
  for (int64_t row = 0; groups->ids && row < its->rows; row++) {
    int64_t id = row_of(groups, its, row);
    if (id < 0 || id >= groups->num_rows) return 0;
  }
  return 1;
}

/* The first of the blocks that one of `owners` threads owns. */
INLINE int64_t first_of(int64_t owner, int64_t owners, int64_t blocks) { return owner * blocks / owners; }

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

/* One of an owner's blocks that nobody has taken; -1: there is none. */
static int64_t take(const struct work *work, int stage, int64_t number, int64_t owner) {
  int32_t *taken = work->taken[stage] + number * work->owners + owner;
  int32_t first = work->firsts[stage][owner], count = work->firsts[stage][owner + 1] - first;
  if (__atomic_load_n(taken, __ATOMIC_RELAXED) >= count) return -1;
  int32_t block = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
  return block < count ? first + block : -1;
}

static void compute_block(const struct work *work, int stage, int64_t number, int64_t block, char *scratch) {
  if (stage) wait_for(&work->done[stage - 1][number], work->blocks[stage - 1]);
  if (stage + 1 < work->stages && number >= work->ring) /* until what is kept there has been used */
    wait_for(&work->done[stage + 1][number - work->ring], work->blocks[stage + 1]);
  struct expert its = expert_of(work->groups, work->experts[number]);
  work->compute(work, &its, stage, block, work->kept + number % work->ring * work->kept_bytes, scratch);
  __atomic_fetch_add(&work->done[stage][number], 1, __ATOMIC_RELEASE);
}

/* One thread's share. All threads go through the stages of the experts in one order: in every step the first stage of
   an expert, and each further one of the expert that came `lag` before. A thread goes on when every block of a stage has
   been taken by somebody. So whoever has taken a block waits only for blocks of what came before, which all are taken,
   by threads that wait at most for what came before these: the first of all blocks that are not computed yet waits for
   nothing, and everything ends, however many threads there are. */
static void share(void *of) {
  struct work *work = of;
  int64_t arrived = __atomic_fetch_add(&work->started, 1, __ATOMIC_RELAXED), block;
  int64_t thread = (work->number ? work->number() : arrived) % work->owners;
  char *scratch = work->scratch + arrived * work->scratch_bytes;
  for (int64_t step = 0; step < work->active + (work->stages - 1) * work->lag; step++)
    for (int stage = 0; stage < work->stages; stage++) {
      int64_t number = step - stage * work->lag;
      if (number < 0 || number >= work->active) continue;
      for (int64_t other = 0; other < work->owners; other++) {
        int64_t owner = thread + other < work->owners ? thread + other : thread + other - work->owners;
        while ((block = take(work, stage, number, owner)) >= 0) {
          TAKEN(thread, stage, number, block);
          compute_block(work, stage, number, block, scratch);
        }
      }
    }
}

/* How many experts have rows, and the most rows of one. 0, or -2 where one of them is not inside. */
static int64_t count_rows(struct work *work) {
  for (int64_t expert = 0; expert < work->groups->experts; expert++) {
    struct expert its = expert_of(work->groups, expert);
    if (!is_active(work->groups, &its)) continue;
    if (!is_inside(work->groups, &its)) return -2;
    work->active++;
    work->longest = larger(work->longest, its.rows);
  }
  return 0;
}

/* All of it, by a team. 0, or -1 where there is no memory for what is kept meanwhile. */
static int64_t run_work(struct work *work, const struct team *team) {
  int64_t threads = team->parallel ? team->threads : 1;
  work->lag = threads > 1; /* so that nobody waits for an expert's last block */
  work->ring = threads > 1 ? RING : 1;
  work->owners = threads;
  /* nobody else for a single block; else all, since OpenMP ends threads that a smaller team leaves out */
  if (work->active * larger(larger(work->blocks[0], work->blocks[1]), work->blocks[2]) < 2) threads = 1;
  work->number = threads > 1 ? team->number : NULL;
  int64_t counters = work->active * work->owners, numbers = work->active + counters + work->owners + 1;
  int64_t lists = lines((work->active + STAGES * numbers) * sizeof(int32_t));
  int64_t kept = work->ring * work->kept_bytes;
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, lists + kept + threads * work->scratch_bytes)) return -1;
  memset(memory, 0, lists);
  work->experts = (int32_t *)memory;
  for (int stage = 0; stage < STAGES; stage++) {
    work->done[stage] = work->experts + work->active + stage * numbers;
    work->taken[stage] = work->done[stage] + work->active;
    work->firsts[stage] = work->taken[stage] + counters;
    for (int64_t owner = 0; owner <= work->owners; owner++)
      work->firsts[stage][owner] = (int32_t)first_of(owner, work->owners, work->blocks[stage]);
  }
  work->kept = memory + lists;
  work->scratch = work->kept + kept;
  for (int64_t expert = 0, number = 0; expert < work->groups->experts; expert++) {
    struct expert its = expert_of(work->groups, expert);
    if (is_active(work->groups, &its)) work->experts[number++] = (int32_t)expert;
  }
  if (threads > 1) team->parallel(share, work, (unsigned)threads, 0);
  else share(work);
  free(memory);
  return 0;
}
