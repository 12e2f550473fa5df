/* What happens to a token's row before its experts and after them, each in one pass. */

/* ids (n,), kept (n,) -> assignments (n,), stably sorted by id, those that are not kept last; offsets
   (num_ids + 1,), where each id's begin, the last one where those of the last end; rows (n,), where each assignment has
   gone, -1 where it is not kept. 0, or -1 where an id that is kept is none of the num_ids. */
int64_t sort_assignments(const int64_t *ids, const uint8_t *kept, int64_t n, int64_t num_ids, int64_t *assignments,
                         int32_t *offsets, int64_t *rows) {
  memset(offsets, 0, (num_ids + 1) * sizeof *offsets);
  for (int64_t i = 0; i < n; i++) {
    if (!kept[i]) continue;
    if (ids[i] < 0 || ids[i] >= num_ids) return -1;
    offsets[ids[i] + 1]++;
  }
  for (int64_t id = 0; id < num_ids; id++) offsets[id + 1] += offsets[id];
  int64_t last = offsets[num_ids];
  for (int64_t i = 0; i < n; i++) {
    int64_t row = kept[i] ? offsets[ids[i]]++ : last++;
    assignments[row] = i;
    rows[i] = kept[i] ? row : -1;
  }
  for (int64_t id = num_ids; id > 0; id--) offsets[id] = offsets[id - 1]; /* each had moved to where the next begin */
  offsets[0] = 0;
  return 0;
}

/* outputs (num_rows, dim) of `dtype`, rows (tokens, choices), weights (tokens, choices) float32 -> sums (tokens, dim)
   of `dtype`, in the order of the choices; a row below 0 adds nothing. total: dim float32. Products and sums are
   rounded one by one. 0, or -1 where there is no such row. */
int64_t add_choices(const void *outputs, int64_t num_rows, const int64_t *rows, const float *weights, void *sums,
                    int64_t tokens, int64_t choices, int64_t dim, float *total, int64_t dtype, int64_t instructions) {
  const struct tiles *tiles = tiles_of(instructions);
  for (int64_t choice = 0; choice < tokens * choices; choice++)
    if (rows[choice] >= num_rows) return -1;
  for (int64_t token = 0; token < tokens; token++) {
    memset(total, 0, dim * sizeof *total);
    for (int64_t choice = token * choices; choice < (token + 1) * choices; choice++)
      if (rows[choice] >= 0)
        tiles->add(total, (const char *)outputs + rows[choice] * dim * SIZE(dtype), weights[choice], dim, (int)dtype);
    tiles->narrow((char *)sums + token * dim * SIZE(dtype), total, dim, (int)dtype);
  }
  return 0;
}
