/* New memory for weights: each thread is the first to touch the pages of the rows that it owns (sharing.h), which Linux
   then puts on the memory node of that thread's CPU. What the memory held is lost. */

#define PAGE 4096 /* the least that there is: a larger one is touched several times */

#ifndef TOUCHED /* tests see who touches what */
#define TOUCHED(thread, page)
#endif

/* Rows of row_bytes each in every slot, by blocks of `block` rows. has_come[owner]: its thread ran. */
struct touching {
  char *start;
  int64_t slots, slot_bytes, rows, row_bytes, block, owners, arrived;
  int (*number)(void);
  char *has_come;
};

/* A page is touched by the owner of the byte with which it begins. */
static void touch_rows_of(const struct touching *its, int64_t owner) {
  int64_t blocks = parts(its->rows, its->block);
  int64_t first = first_of(owner, its->owners, blocks) * its->block;
  int64_t end = smaller(first_of(owner + 1, its->owners, blocks) * its->block, its->rows);
  for (int64_t slot = 0; slot < its->slots; slot++) {
    uintptr_t begin = (uintptr_t)its->start + slot * its->slot_bytes;
    for (uintptr_t page = parts(begin + first * its->row_bytes, PAGE) * PAGE; page < begin + end * its->row_bytes;
         page += PAGE) {
      *(volatile char *)page = 0;
      TOUCHED(owner, page);
    }
  }
}

static void touch_own(void *of) {
  struct touching *its = of;
  int64_t arrived = __atomic_fetch_add(&its->arrived, 1, __ATOMIC_RELAXED);
  int64_t thread = (its->number ? its->number() : arrived) % its->owners;
  touch_rows_of(its, thread);
  its->has_come[thread] = 1;
}

static void touch(struct touching its, const struct team *team) {
  its.owners = team->parallel ? team->threads : 1;
  its.number = team->number;
  char has_come[its.owners];
  memset(has_come, 0, its.owners);
  its.has_come = has_come;
  if (its.owners > 1) team->parallel(touch_own, &its, (unsigned)its.owners, 0);
  for (int64_t owner = 0; owner < its.owners; owner++) /* a team may be smaller than asked for */
    if (!has_come[owner]) touch_rows_of(&its, owner);
}

/* The weights of all slots, of a call without rows. */
int64_t touch_experts(const struct call *call) {
  int64_t size = SIZE(call->dtype);
  for (int layer = 0; layer < call->layers; layer++) {
    const struct layer *its = &call->layer[layer];
    int64_t row_bytes = its->inputs * size;
    touch((struct touching){.start = (char *)its->weight, .slots = call->groups.num_slots,
                            .slot_bytes = its->outputs * row_bytes, .rows = its->outputs, .row_bytes = row_bytes,
                            .block = block_of(call, layer)},
          &call->team);
  }
  return 0;
}

/* As touch_experts: the codes and their scales. */
int64_t touch_quantized(const struct quantized_call *call) {
  for (int layer = 0; layer < call->layers; layer++) {
    const struct quantized_layer *its = &call->layer[layer];
    int64_t groups = parts(its->inputs, GROUP);
    struct touching plane = {.start = (char *)its->codes, .slots = call->groups.num_slots,
                             .slot_bytes = its->slot_bytes, .rows = its->outputs, .row_bytes = groups * 8 * call->bits,
                             .block = outputs_of(call, its)};
    touch(plane, &call->team);
    plane.start = (char *)its->scales;
    plane.row_bytes = groups * 2;
    touch(plane, &call->team);
  }
  return 0;
}
