/* Compiled before kernel.c: who computes which block and who touches which page, for test_sharing.py. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#undef __x86_64__ /* plain instructions alone: the others take most of the compiler's time */

#define MOST 65536

/* thread and the system's number of it; stage, number and block, or a page alone */
struct record {
  int64_t thread, system_thread, stage, number, place;
};

struct record taken[MOST], touched[MOST];
int64_t num_taken, num_touched, sleeps[64], team_size; /* sleeps: microseconds per block, of each thread */

static void note(struct record *records, int64_t *count, int64_t thread, int64_t stage, int64_t number, int64_t place) {
  int64_t at = __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
  if (at < MOST) records[at] = (struct record){thread, (int64_t)pthread_self(), stage, number, place};
}

static void note_taken(int64_t thread, int64_t stage, int64_t number, int64_t block) {
  note(taken, &num_taken, thread, stage, number, block);
  if (sleeps[thread]) usleep((useconds_t)sleeps[thread]);
}

#define TAKEN(thread, stage, number, block) note_taken(thread, stage, number, block)
#define TOUCHED(thread, page) note(touched, &num_touched, thread, 0, 0, (int64_t)(page))

static __thread int own_number;
int own_number_of_team(void) { return own_number; }

struct start {
  void (*run)(void *);
  void *data;
  int number;
};

static void *start_one(void *of) {
  struct start *its = of;
  own_number = its->number;
  its->run(its->data);
  return NULL;
}

/* As GOMP_parallel, with a team of team_size, numbered from the last one of `threads` down. */
void smaller_team(void (*run)(void *), void *data, unsigned threads, unsigned flags) {
  pthread_t ids[64];
  struct start starts[64];
  (void)flags;
  for (int64_t i = 0; i < team_size; i++) {
    starts[i] = (struct start){run, data, (int)(threads - 1 - i)};
    pthread_create(&ids[i], NULL, start_one, &starts[i]);
  }
  for (int64_t i = 0; i < team_size; i++) pthread_join(ids[i], NULL);
}
