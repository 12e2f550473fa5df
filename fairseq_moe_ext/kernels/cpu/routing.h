/* What happens to a token's row before its experts and after them, each in one pass. choose_experts and normalize_choices
   give PyTorch's bits, products and sums rounded one by one. */

/* The first of the largest values but for the one at `without`, which counts as -infinity; a NaN is larger than all. */
INLINE int64_t largest(const float *values, int64_t count, int64_t without) {
  int64_t best = 0;
  float most = without == 0 ? -INFINITY : values[0];
  for (int64_t i = 1; i < count; i++)
    if (!(values[i] <= most) && i != without) {
      if (most != most) break;
      most = values[i];
      best = i;
    }
  return best;
}

/* probabilities (tokens, experts), logits (tokens, experts) or NULL, is_padding (tokens,) or NULL -> ids (tokens,
   choices), the expert of the largest probability and, where there are logits, that of the largest of the others;
   weights (tokens, choices), their probabilities; kept (tokens, choices), false on padding. */
void choose_experts(const float *probabilities, const float *logits, const uint8_t *is_padding, int64_t tokens,
                    int64_t experts, int64_t *ids, float *weights, uint8_t *kept) {
  int64_t choices = logits ? 2 : 1;
  for (int64_t token = 0; token < tokens; token++) {
    const float *its = probabilities + token * experts;
    ids[token * choices] = largest(its, experts, -1);
    if (logits) ids[token * choices + 1] = largest(logits + token * experts, experts, ids[token * choices]);
    for (int64_t choice = token * choices; choice < (token + 1) * choices; choice++) {
      weights[choice] = its[ids[choice]];
      kept[choice] = !(is_padding && is_padding[token]);
    }
  }
}

/* weights, kept (tokens, choices) -> normalized: over the sum of the token's that are kept, or over `least` if that is
   more; zero where not kept. */
void normalize_choices(const float *weights, const uint8_t *kept, int64_t tokens, int64_t choices, float least,
                       float *normalized) {
  for (int64_t first = 0; first < tokens * choices; first += choices) {
    float total = 0;
    for (int64_t choice = first; choice < first + choices; choice++)
      if (kept[choice]) total += weights[choice];
    if (total < least) total = least;
    for (int64_t choice = first; choice < first + choices; choice++)
      normalized[choice] = kept[choice] ? weights[choice] / total : 0;
  }
}

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
