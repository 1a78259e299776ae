// Every row's own adapters: shrink (x A^T, one dot product per rank) and expand (times B, added to a tile of the output).
//
// Work: a shrink task is one (adapter, module, block of rows); it reads that adapter's A once for all its rows.
// Expand runs inside the linear's tile, column panel outermost, so the 32 columns of B that a tile needs stay in the first-level
// cache for all rows; every byte of an adapter leaves main memory once a step. Bound expected: those bytes
// (rank 8 on all linears of SmolLM2-135M in bfloat16: 4.9 MB an adapter) over the memory bandwidth.
//
// Order, whatever the batch: a dot product runs over the inputs in 16 lanes (32 elements a step in bfloat16) and is then reduced;
// an output element adds modules in span order, terms in row order, ranks in ascending order.

constexpr int64_t kShrinkRows = 32;  // rows of one shrink task

struct ShrinkTask {
  int32_t group, span, begin, end;  // terms [begin, end) of `order`
};

// The step's terms sorted by adapter, and the place of every term's scaled x A^T.
struct LoraPlan {
  const Lora* lora;
  float* coefficients;   // [N, stride]: weight * scale * (x A^T), modules side by side
  int64_t stride;
  int64_t* span_offset;  // [span_count] first column of a module's ranks
  int32_t* term_row;     // [N]
  int32_t* order;        // [N] terms by adapter, stable
  int32_t* group_slot;   // [groups]
  int32_t* group_start;  // [groups + 1]
  int32_t groups;
  ShrinkTask* tasks;
  int64_t task_count;
  int64_t tasks_done;  // atomic
};

OL_INLINE int64_t rank_of(const Lora& lora, const int64_t* span, int32_t slot) { return lora.ranks[span[0] * lora.slot_count + slot]; }

template <class TP>
OL_INLINE const TP* page_of(const Lora& lora, int32_t slot, int64_t page_index) {
  const int64_t page = lora.slot_pages[slot * lora.max_pages + page_index];
  return static_cast<const TP*>(lora.pages) + page * lora.page_elements;
}

static void sort_terms(LoraPlan& plan, int64_t rows) {
  const Lora& lora = *plan.lora;
  const int64_t count = lora.term_count;
  int32_t* group_of = plan.order + count;  // scratch half
  int32_t* sizes = plan.group_start;
  plan.groups = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int32_t n = lora.row_start[row]; n < lora.row_start[row + 1]; ++n) {
      plan.term_row[n] = static_cast<int32_t>(row);
      int32_t g = n > 0 && lora.slot[n] == lora.slot[n - 1] ? group_of[n - 1] : 0;
      while (g < plan.groups && plan.group_slot[g] != lora.slot[n]) ++g;
      if (g == plan.groups) {
        plan.group_slot[plan.groups++] = lora.slot[n];
        sizes[g] = 0;
      }
      group_of[n] = g;
      sizes[g] += 1;
    }
  int32_t start = 0;
  for (int32_t g = 0; g < plan.groups; ++g) {
    const int32_t size = sizes[g];
    plan.group_start[g] = start;
    start += size;
  }
  plan.group_start[plan.groups] = start;
  int32_t* cursor = group_of + count;
  for (int32_t g = 0; g < plan.groups; ++g) cursor[g] = plan.group_start[g];
  for (int64_t n = 0; n < count; ++n) plan.order[cursor[group_of[n]]++] = static_cast<int32_t>(n);
}

static void list_tasks(LoraPlan& plan) {
  const Lora& lora = *plan.lora;
  plan.stride = 0;
  plan.task_count = 0;
  plan.tasks_done = 0;
  for (int64_t s = 0; s < lora.span_count; ++s) {
    const int64_t* span = lora.spans + s * kSpanFields;
    int64_t widest = 0;
    for (int32_t g = 0; g < plan.groups; ++g) {
      const int64_t rank = rank_of(lora, span, plan.group_slot[g]);
      if (rank == 0) continue;
      widest = rank > widest ? rank : widest;
      for (int32_t begin = plan.group_start[g]; begin < plan.group_start[g + 1]; begin += kShrinkRows) {
        const int32_t stop = plan.group_start[g + 1], end = begin + kShrinkRows < stop ? begin + kShrinkRows : stop;
        plan.tasks[plan.task_count++] = {g, static_cast<int32_t>(s), begin, end};
      }
    }
    plan.span_offset[s] = plan.stride;
    plan.stride += widest;
  }
}

static void make_plan(LoraPlan& plan, const Lora& lora, int64_t rows) {
  const size_t n = static_cast<size_t>(lora.term_count), spans = static_cast<size_t>(lora.span_count);
  const size_t tasks = spans * n;
  auto* bytes = static_cast<char*>(scratch(kPlanScratch, tasks * sizeof(ShrinkTask) + spans * 8 + (n * 7 + 8) * 4));
  plan.lora = &lora;
  plan.tasks = reinterpret_cast<ShrinkTask*>(bytes);
  plan.span_offset = reinterpret_cast<int64_t*>(bytes + tasks * sizeof(ShrinkTask));
  plan.term_row = reinterpret_cast<int32_t*>(plan.span_offset + spans);
  plan.order = plan.term_row + n;           // and 2 n more of scratch
  plan.group_slot = plan.order + 3 * n;     // at most n
  plan.group_start = plan.group_slot + n;   // at most n + 1
  sort_terms(plan, rows);
  list_tasks(plan);
  plan.coefficients = static_cast<float*>(scratch(kShrinkScratch, n * static_cast<size_t>(plan.stride) * 4 + 64));
}

// Sixteen lanes of products of two rows. Elements after `n` count as zero.
template <class TX, class TP>
struct Dot {  // float lanes: any mix of types
  static constexpr int64_t kWidth = 16;
  OL_INLINE V step(V acc, const TX* x, const TP* a) { return fma(load(a), load(x), acc); }
  OL_INLINE V tail(V acc, const TX* x, const TP* a, int64_t n) { return fma(load_n(a, n), load_n(x, n), acc); }
};
template <>
struct Dot<bf16, bf16> {  // 32 elements a step
  static constexpr int64_t kWidth = 32;
  OL_INLINE V step(V acc, const bf16* x, const bf16* a) { return dot(acc, load_pairs(a), load_pairs(x)); }
  OL_INLINE V tail(V acc, const bf16* x, const bf16* a, int64_t n) {
    alignas(64) bf16 xs[32] = {}, as[32] = {};
    __builtin_memcpy(xs, x, static_cast<size_t>(n) * 2);
    __builtin_memcpy(as, a, static_cast<size_t>(n) * 2);
    return step(acc, xs, as);
  }
};

template <class TX, class TP, int ROWS, int RANKS>
static void shrink_tile(const TX* const* x, const TP* a, int64_t inputs, const float* scale, float* const* out, int64_t rank) {
  using D = Dot<TX, TP>;
  V acc[ROWS][RANKS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < RANKS; ++j) acc[i][j] = zero();
  int64_t k = 0;
  for (; k + D::kWidth <= inputs; k += D::kWidth)
#pragma GCC unroll 4
    for (int j = 0; j < RANKS; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) acc[i][j] = D::step(acc[i][j], x[i] + k, a + j * inputs + k);
  if (k < inputs)
    for (int j = 0; j < RANKS; ++j)
      for (int i = 0; i < ROWS; ++i) acc[i][j] = D::tail(acc[i][j], x[i] + k, a + j * inputs + k, inputs - k);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < RANKS; ++j) out[i][rank + j] = scale[i] * sum(acc[i][j]);
}

template <class TX, class TP, int ROWS>
static void shrink_ranks(const TX* const* x, const TP* a, int64_t inputs, const float* scale, float* const* out, int64_t rank, int64_t ranks) {
  int64_t r = 0;
  for (; r + 4 <= ranks; r += 4) shrink_tile<TX, TP, ROWS, 4>(x, a + r * inputs, inputs, scale, out, rank + r);
  for (; r < ranks; ++r) shrink_tile<TX, TP, ROWS, 1>(x, a + r * inputs, inputs, scale, out, rank + r);
}

template <class TP>
OL_INLINE void prefetch_run(const TP* begin, int64_t elements) {
  const char* end = reinterpret_cast<const char*>(begin + elements);
  for (const char* line = reinterpret_cast<const char*>(begin); line < end; line += 64) _mm_prefetch(line, _MM_HINT_T1);
}

template <class TX, class TP>
static void shrink(LoraPlan& plan, const TX* x, int64_t inputs, int64_t task_index) {
  const Lora& lora = *plan.lora;
  const ShrinkTask task = plan.tasks[task_index];
  const int64_t* span = lora.spans + task.span * kSpanFields;
  const int32_t slot = plan.group_slot[task.group];
  const int64_t rank = rank_of(lora, span, slot);
  const float scale = lora.scales[span[0] * lora.slot_count + slot];
  for (int64_t done = 0, page = 0; done < rank; done += lora.page_rank, ++page) {
    const TP* a = page_of<TP>(lora, slot, page) + span[1];
    const int64_t ranks = rank - done < lora.page_rank ? rank - done : lora.page_rank;
    if (task.begin == plan.group_start[task.group]) {  // B too: its rows lie side by side here, but far apart for a tile of outputs
      prefetch_run(a, ranks * inputs);
      prefetch_run(a - span[1] + span[2], ranks * span[4]);
    }
    for (int32_t at = task.begin; at < task.end; at += 4) {
      const TX* rows[4];
      float* out[4];
      float scales[4];
      const int count = task.end - at < 4 ? task.end - at : 4;
      for (int i = 0; i < count; ++i) {
        const int32_t term = plan.order[at + i];
        rows[i] = x + plan.term_row[term] * inputs;
        out[i] = plan.coefficients + term * plan.stride + plan.span_offset[task.span];
        scales[i] = lora.weight[term] * scale;
      }
      if (count == 4) shrink_ranks<TX, TP, 4>(rows, a, inputs, scales, out, done, ranks);
      else if (count == 3) shrink_ranks<TX, TP, 3>(rows, a, inputs, scales, out, done, ranks);
      else if (count == 2) shrink_ranks<TX, TP, 2>(rows, a, inputs, scales, out, done, ranks);
      else shrink_ranks<TX, TP, 1>(rows, a, inputs, scales, out, done, ranks);
    }
  }
}

// Wait until every shrink task, claimed before any tile by some running thread, has left its coefficients.
OL_INLINE void wait_for_shrink(LoraPlan& plan) {
  while (__atomic_load_n(&plan.tasks_done, __ATOMIC_ACQUIRE) < plan.task_count) _mm_pause();
}

// Add 32 (or, at a module's edge, fewer) columns of one module's delta to one row of a tile. `b_column` is the tile's column in B.
template <class TP, bool WHOLE>
OL_INLINE void expand_span(const LoraPlan& plan, int64_t s, int64_t row, float* tile, int64_t b_column, int64_t count) {
  const Lora& lora = *plan.lora;
  const int64_t* span = lora.spans + s * kSpanFields;
  const int64_t outputs = span[4];
  V lo = WHOLE ? load(tile) : load_n(tile, count < 16 ? count : 16);
  V hi = WHOLE ? load(tile + 16) : count > 16 ? load_n(tile + 16, count - 16) : zero();
  for (int32_t term = lora.row_start[row]; term < lora.row_start[row + 1]; ++term) {
    const int32_t slot = lora.slot[term];
    const int64_t rank = rank_of(lora, span, slot);
    const float* c = plan.coefficients + term * plan.stride + plan.span_offset[s];
    for (int64_t done = 0, page = 0; done < rank; done += lora.page_rank, ++page) {  // no division: it would cost more than the sums
      const TP* b = page_of<TP>(lora, slot, page) + span[2] + b_column;
      const int64_t ranks = rank - done < lora.page_rank ? rank - done : lora.page_rank;
      for (int64_t r = 0; r < ranks; ++r, b += outputs) {
        const V coefficient = set1(c[done + r]);
        lo = fma(coefficient, WHOLE ? load(b) : load_n(b, count < 16 ? count : 16), lo);
        if (WHOLE) hi = fma(coefficient, load(b + 16), hi);
        else if (count > 16) hi = fma(coefficient, load_n(b + 16, count - 16), hi);
      }
    }
  }
  if (WHOLE) {
    store(tile, lo);
    store(tile + 16, hi);
  } else {
    store_n(tile, count < 16 ? count : 16, lo);
    if (count > 16) store_n(tile + 16, count - 16, hi);
  }
}

// Columns of module s inside the panel that starts at `column`: [lo, hi) relative to the panel; lo >= hi when it has none.
OL_INLINE void overlap(const int64_t* span, int64_t column, int64_t& lo, int64_t& hi) {
  lo = span[5] > column ? span[5] - column : 0;
  hi = span[5] + span[4] < column + kPanel ? span[5] + span[4] - column : kPanel;
}

template <class TP>
static void expand(const LoraPlan& plan, int64_t first_row, int rows, int64_t column, float* tile) {
  const Lora& lora = *plan.lora;
  for (int64_t s = 0; s < lora.span_count; ++s) {
    const int64_t* span = lora.spans + s * kSpanFields;
    int64_t lo, hi;
    overlap(span, column, lo, hi);
    if (lo >= hi) continue;
    const int64_t b_column = column + lo - span[5];
    for (int i = 0; i < rows; ++i) {
      if (hi - lo == kPanel) expand_span<TP, true>(plan, s, first_row + i, tile + i * kPanel, b_column, kPanel);
      else expand_span<TP, false>(plan, s, first_row + i, tile + i * kPanel + lo, b_column, hi - lo);
    }
  }
}
