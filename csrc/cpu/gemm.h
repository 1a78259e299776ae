// y = x W^T + bias + adapters on prepacked weights.
//
// Packing: panels of 32 outputs; inside a panel the inputs run outermost: bfloat16 [ceil(H / 2)][32][2], float [H][32]. A tile of up to
// kMaxTileRows rows and 32 outputs lives in registers while the panel streams by.
// Work: a task is a run of panels times a block of rows; each thread claims tasks one by one.
// Bytes: the weight once per 256 rows (from main memory: every model is larger than the caches), x once per panel from cache.
// Bound expected: memory bandwidth up to about 16 rows on Zen 5 (2 vdpbf16ps a cycle and core), arithmetic beyond.
//
// Order: every output element adds its products in ascending input order into one accumulator, in a tile of any height, at any
// place and on any thread: a row's bits never depend on its batch.

constexpr int64_t kRowBlock = 256;

struct Tile {
  const Linear* linear;
  LoraPlan* plan;  // null without adapters
};

template <class T, int ROWS, bool PREFETCH>
static void tile_sums(const T* x, int64_t inputs, const T* panel, int64_t steps, float* out) {
  using S = Step<T>;
  constexpr int64_t kLine = kPanel * S::kSize;
  V acc[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) acc[i][0] = acc[i][1] = zero();
  for (int64_t k = 0; k < steps; ++k) {
    const auto w0 = S::load_vec(panel + k * kLine);
    const auto w1 = S::load_vec(panel + k * kLine + kLine / 2);
    if (PREFETCH) {
      const char* ahead = reinterpret_cast<const char*>(panel + (k + steps) * kLine);
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto b = S::broadcast(x + i * inputs + k * S::kSize);
      acc[i][0] = S::madd(acc[i][0], w0, b);
      acc[i][1] = S::madd(acc[i][1], w1, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    store(out + i * kPanel, acc[i][0]);
    store(out + i * kPanel + 16, acc[i][1]);
  }
}

template <class T, bool PREFETCH>
static void tile_any(int rows, const T* x, int64_t inputs, const T* panel, int64_t steps, float* out) {
  switch (rows) {
    case 1: return tile_sums<T, 1, PREFETCH>(x, inputs, panel, steps, out);
    case 2: return tile_sums<T, 2, PREFETCH>(x, inputs, panel, steps, out);
#if defined(__AVX512F__)
    case 3: return tile_sums<T, 3, PREFETCH>(x, inputs, panel, steps, out);
    case 4: return tile_sums<T, 4, PREFETCH>(x, inputs, panel, steps, out);
    case 5: return tile_sums<T, 5, PREFETCH>(x, inputs, panel, steps, out);
    case 6: return tile_sums<T, 6, PREFETCH>(x, inputs, panel, steps, out);
    case 7: return tile_sums<T, 7, PREFETCH>(x, inputs, panel, steps, out);
    default: return tile_sums<T, 8, PREFETCH>(x, inputs, panel, steps, out);
#endif
  }
}

// Bias, adapters, one rounding.
template <class T, class TO, class TP>
static void finish_tile(const Linear& a, LoraPlan* plan, int64_t row, int rows, int64_t column, float* tile) {
  const int64_t count = a.outputs - column < kPanel ? a.outputs - column : kPanel;
  const int64_t n0 = count < 16 ? count : 16, n1 = count - n0;
  if (a.bias != nullptr) {
    const T* bias = static_cast<const T*>(a.bias) + column;
    const V b0 = load_n(bias, n0), b1 = n1 > 0 ? load_n(bias + 16, n1) : zero();
    for (int i = 0; i < rows; ++i) {
      store(tile + i * kPanel, add(load(tile + i * kPanel), b0));
      store(tile + i * kPanel + 16, add(load(tile + i * kPanel + 16), b1));
    }
  }
  if (plan != nullptr) expand<TP>(*plan, row, rows, column, tile);
  TO* y = static_cast<TO*>(a.y) + row * a.outputs + column;
  for (int i = 0; i < rows; ++i, y += a.outputs) {
    store_n(y, n0, load(tile + i * kPanel));
    if (n1 > 0) store_n(y + 16, n1, load(tile + i * kPanel + 16));
  }
}

template <class TO>
static void load_tile(const Linear& a, int64_t row, int rows, int64_t column, float* tile) {
  const int64_t count = a.outputs - column < kPanel ? a.outputs - column : kPanel;
  const TO* y = static_cast<const TO*>(a.y) + row * a.outputs + column;
  for (int i = 0; i < rows; ++i, y += a.outputs) {
    store(tile + i * kPanel, load_n(y, count < 16 ? count : 16));
    if (count > 16) store(tile + i * kPanel + 16, load_n(y + 16, count - 16));
  }
}

// All rows [row0, row1) of one panel.
template <class T, class TO, class TP>
static void run_panel(const Linear& a, LoraPlan* plan, const T* x, int64_t padded, int64_t row0, int64_t row1, int64_t panel_index, bool has_next) {
  const int64_t steps = padded / Step<T>::kSize, column = panel_index * kPanel;
  const T* panel = static_cast<const T*>(a.packed) + panel_index * steps * kPanel * Step<T>::kSize;
  alignas(64) float tile[kMaxTileRows * kPanel];
  bool waited = plan == nullptr;
  const int64_t tiles = (row1 - row0 + kMaxTileRows - 1) / kMaxTileRows;
  for (int64_t t = 0, row = row0; t < tiles; ++t) {
    const int rows = static_cast<int>((row1 - row + tiles - t - 1) / (tiles - t));  // even heights: 9 rows are 5 + 4
    if (a.packed == nullptr) load_tile<TO>(a, row, rows, column, tile);
    else if (has_next && tiles > 1 && t + 1 == tiles) tile_any<T, true>(rows, x + row * padded, padded, panel, steps, tile);
    else tile_any<T, false>(rows, x + row * padded, padded, panel, steps, tile);
    if (!waited) {
      wait_for_shrink(*plan);
      waited = true;
    }
    finish_tile<T, TO, TP>(a, plan, row, rows, column, tile);
    row += rows;
  }
}

// bfloat16 reads inputs in pairs: an odd count is copied with a zero at the end.
template <class T>
static const T* padded_rows(const Linear& a, int64_t& padded) {
  padded = (a.inputs + Step<T>::kSize - 1) / Step<T>::kSize * Step<T>::kSize;
  const T* x = static_cast<const T*>(a.x);
  if (padded == a.inputs) return x;
  T* copy = static_cast<T*>(scratch(kRowScratch, static_cast<size_t>(a.rows * padded) * sizeof(T)));
  for (int64_t row = 0; row < a.rows; ++row) {
    __builtin_memcpy(copy + row * padded, x + row * a.inputs, static_cast<size_t>(a.inputs) * sizeof(T));
    copy[row * padded + a.inputs] = T(0);
  }
  return copy;
}

template <class T, class TO, class TP>
static void linear_typed(const Linear& a) {
  LoraPlan storage, *plan = nullptr;
  if (a.lora.term_count > 0) {
    plan = &storage;
    make_plan(storage, a.lora, a.rows);
    if (storage.task_count == 0) plan = nullptr;
  }
  int64_t padded;
  const T* x = padded_rows<T>(a, padded);
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t row_blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  const int64_t per_task = panels >= 16 * a.threads ? panels / (8 * a.threads) : 1;
  const int64_t runs = (panels + per_task - 1) / per_task;
  const int64_t shrinks = plan == nullptr ? 0 : plan->task_count;
  auto body = [&](int64_t chunk) {
    if (chunk < shrinks) {
      shrink<T, TP>(*plan, static_cast<const T*>(a.x), a.inputs, chunk);
      __atomic_fetch_add(&plan->tasks_done, 1, __ATOMIC_RELEASE);
      return;
    }
    chunk -= shrinks;
    const int64_t row0 = chunk / runs * kRowBlock, row1 = row0 + kRowBlock < a.rows ? row0 + kRowBlock : a.rows;
    const int64_t begin = chunk % runs * per_task, end = begin + per_task < panels ? begin + per_task : panels;
    for (int64_t p = begin; p < end; ++p) run_panel<T, TO, TP>(a, plan, x, padded, row0, row1, p, p + 1 < panels);
  };
  parallel_if(a.rows * a.inputs * a.outputs > 16384, a.threads, shrinks + runs * row_blocks, body);
}

template <class T, class TO>
static void linear_pages(const Linear& a) {
  if (a.lora.pages_are_float) linear_typed<T, TO, float>(a);
  else linear_typed<T, TO, bf16>(a);
}

static void linear(const Linear& a) {
  if (a.rows == 0) return;
  if (a.is_float) linear_pages<float, float>(a);
  else if (a.out_is_float) linear_pages<bf16, float>(a);
  else linear_pages<bf16, bf16>(a);
}
