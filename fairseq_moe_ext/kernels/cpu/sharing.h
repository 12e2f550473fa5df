/* How threads share the experts of a call. An expert goes through stages, each of some blocks; threads take the blocks
   by turns. What one stage leaves for the next is kept in the cache. */

#define STAGES 3
#define RING 4                 /* experts whose stages several threads compute at a time */
#define BLOCK_BYTES (64 << 10) /* of weights, about, that one thread takes at a time */

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
};

struct expert {
  int64_t source, target, rows, slot;
};

/* A call under way. done[stage][number]: blocks that are computed of the expert that is the `number`th to have rows.
   kept: what `compute` keeps of an expert from stage to stage; scratch: what it needs meanwhile, of each thread. */
struct work {
  const struct groups *groups;
  const void *call;
  void (*compute)(const struct work *, const struct expert *, int stage, int64_t block, char *kept, char *scratch);
  int64_t stages, blocks[STAGES], kept_bytes, scratch_bytes;
  int64_t active, longest, lag, ring, next, started;
  int32_t *experts, *done[STAGES];
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

/* One thread's share. Blocks are handed out in order: in every step the first stage of an expert, and each further one
   of the expert that came `lag` before, for which all blocks of the stage before were handed out by then. Nobody waits
   for what comes later. */
static void share(void *of) {
  struct work *work = of;
  char *scratch = work->scratch + __atomic_fetch_add(&work->started, 1, __ATOMIC_RELAXED) * work->scratch_bytes;
  int64_t per_step = work->blocks[0] + work->blocks[1] + work->blocks[2];
  int64_t items = (work->active + (work->stages - 1) * work->lag) * per_step;
  for (;;) {
    int64_t item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (item >= items) return;
    int64_t block = item % per_step, number = item / per_step;
    int stage = 0;
    for (; block >= work->blocks[stage]; stage++, number -= work->lag) block -= work->blocks[stage];
    if (number < 0 || number >= work->active) continue;
    if (stage) wait_for(&work->done[stage - 1][number], work->blocks[stage - 1]);
    if (stage + 1 < work->stages && number >= work->ring) /* until what is kept there has been used */
      wait_for(&work->done[stage + 1][number - work->ring], work->blocks[stage + 1]);
    struct expert its = expert_of(work->groups, work->experts[number]);
    work->compute(work, &its, stage, block, work->kept + number % work->ring * work->kept_bytes, scratch);
    __atomic_fetch_add(&work->done[stage][number], 1, __ATOMIC_RELEASE);
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
  threads = smaller(threads, work->active * larger(larger(work->blocks[0], work->blocks[1]), work->blocks[2]));
  int64_t lists = lines((1 + STAGES) * work->active * sizeof(int32_t));
  int64_t kept = work->ring * work->kept_bytes;
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, lists + kept + threads * work->scratch_bytes)) return -1;
  memset(memory, 0, lists);
  work->experts = (int32_t *)memory;
  for (int stage = 0; stage < STAGES; stage++) work->done[stage] = work->experts + (1 + stage) * work->active;
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
