// Causal attention over the paged cache, prefill chunks and decode alike.
//
// Work: a task is (sequence, key/value head, block of query rows): all query heads of the group share every key and value it reads.
// Keys are taken 64 at a time, at absolute positions 0, 64, 128, ...: transposed into a scratch tile (pairs of the head dimension
// outermost), scored, and folded into a running softmax (Milakov and Gimelshein, 2018); values are widened to float once a tile.
// Scratch a thread: 16 KiB of keys, 16 KiB of values, 24 rows of scores and sums at D = 64: inside the first two cache levels.
// Bytes: every key and value of the context once per block of query rows. Bound expected: memory in decode, arithmetic in prefill.
//
// Order: a score adds its products in ascending head dimension; a row's maximum, sum (16 lanes by key position) and output
// follow the absolute key blocks in ascending order. Nothing depends on chunking, batch, cache blocks or threads.
// Precision: scores and probabilities stay float32, values are multiplied in float32.

constexpr int kKeyTile = 64;
constexpr int kQueryTile = 24;  // query rows x heads of one task

struct AttentionScratch {
  void* queries;   // [kQueryTile, D padded to pairs]
  void* keys;      // transposed tile
  float* values;   // [kKeyTile, D padded to 16]
  float* scores;   // [kQueryTile, kKeyTile]
  float* outputs;  // [kQueryTile, D padded to 16]
};

struct AttentionTask {
  int64_t group;
  const int32_t* table;
  int64_t first_row, rows;  // of the whole batch
  int64_t first_position;
  int64_t first_head, heads;
};

OL_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
OL_INLINE const T* cache_row(const Attention& a, const void* cache, const AttentionTask& task, int64_t position) {
  const int64_t block = task.table[position / a.block_size];
  return static_cast<const T*>(cache) + ((block * a.groups + task.group) * a.block_size + position % a.block_size) * a.head_size;
}

// The tile that this thread will probably need after the current one. Cache blocks are too short for the hardware to find the
// pattern, and a burst of requests would fill the miss buffers and stall: one row is asked for with every row that is used.
struct NextTile {
  const AttentionTask* task;  // null: nothing to ask for
  int64_t key0, count;
};

template <class T>
OL_INLINE void prefetch_row(const Attention& a, const void* cache, const NextTile& next, int64_t k) {
  if (next.task == nullptr || k >= next.count) return;
  const char* row = reinterpret_cast<const char*>(cache_row<T>(a, cache, *next.task, next.key0 + k));
  for (int64_t line = 0; line < a.head_size * static_cast<int64_t>(sizeof(T)); line += 64) _mm_prefetch(row + line, _MM_HINT_T0);
}

OL_INLINE int64_t first_key(const Attention& a, const AttentionTask& task) {
  const int64_t key = a.window > 0 && task.first_position - a.window + 1 > 0 ? task.first_position - a.window + 1 : 0;
  return key / kKeyTile * kKeyTile;
}

OL_INLINE NextTile tile_at(const AttentionTask* task, int64_t key0) {
  const int64_t left = task->first_position + task->rows - key0;
  return {task, key0, left < kKeyTile ? left : kKeyTile};
}

// keys: [steps][kKeyTile] of one Step each, where a step is a dword (a pair of bfloat16, or one float).
template <class T>
static void transpose_keys(const Attention& a, const AttentionTask& task, int64_t key0, int64_t count, const NextTile& next, uint32_t* keys) {
  const int64_t size = a.head_size, steps = (size + Step<T>::kSize - 1) / Step<T>::kSize;
  for (int64_t k = 0; k < count; k += 16) {
    const uint32_t* rows[16];
    const int64_t live = count - k < 16 ? count - k : 16;
    for (int64_t i = 0; i < 16; ++i) prefetch_row<T>(a, a.key_cache, next, k + i);
    for (int64_t i = 0; i < 16; ++i)  // lanes after the last key repeat it; they are masked later
      rows[i] = reinterpret_cast<const uint32_t*>(cache_row<T>(a, a.key_cache, task, key0 + k + (i < live ? i : live - 1)));
    int64_t s = 0;
    for (; s + 16 <= steps; s += 16) {
      transpose_16x16(rows, keys + s * kKeyTile + k, kKeyTile);
      for (int64_t i = 0; i < 16; ++i) rows[i] += 16;
    }
    for (int64_t i = 0; i < 16; ++i)
      for (int64_t j = s; j < steps; ++j) {
        const int64_t elements = size - j * Step<T>::kSize;
        uint32_t dword = 0;
        __builtin_memcpy(&dword, rows[i] + (j - s), elements >= Step<T>::kSize ? 4 : 2);
        keys[j * kKeyTile + k + i] = dword;
      }
  }
}

template <class T>
static void widen_values(const Attention& a, const AttentionTask& task, int64_t key0, int64_t count, int64_t padded, const NextTile& next, float* values) {
  for (int64_t k = 0; k < count; ++k) {
    const T* row = cache_row<T>(a, a.value_cache, task, key0 + k);
    prefetch_row<T>(a, a.value_cache, next, k);
    for (int64_t d = 0; d < a.head_size; d += 16) store(values + k * padded + d, load_n(row + d, a.head_size - d));
  }
}

template <class T, int ROWS, int VECS>
static void score_tile(const T* queries, int64_t query_stride, const T* keys, int64_t steps, float scale, float* scores) {
  using S = Step<T>;
  V acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) acc[i][v] = zero();
  for (int64_t s = 0; s < steps; ++s) {
    typename S::Vec k[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) k[v] = S::load_vec(keys + (s * kKeyTile + v * 16) * S::kSize);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const auto q = S::broadcast(queries + i * query_stride + s * S::kSize);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[i][v] = S::madd(acc[i][v], k[v], q);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store(scores + i * kKeyTile + v * 16, mul(acc[i][v], set1(scale)));
}

template <class T, int VECS>
static void score_rows(int64_t rows, const T* queries, int64_t query_stride, const T* keys, int64_t steps, float scale, float* scores) {
  int64_t i = 0;
  for (; i + kMaxAttentionRows <= rows; i += kMaxAttentionRows)
    score_tile<T, kMaxAttentionRows, VECS>(queries + i * query_stride, query_stride, keys, steps, scale, scores + i * kKeyTile);
  const T* rest = queries + i * query_stride;
  float* out = scores + i * kKeyTile;
  switch (rows - i) {
    case 1: return score_tile<T, 1, VECS>(rest, query_stride, keys, steps, scale, out);
#if defined(__AVX512F__)
    case 2: return score_tile<T, 2, VECS>(rest, query_stride, keys, steps, scale, out);
    case 3: return score_tile<T, 3, VECS>(rest, query_stride, keys, steps, scale, out);
    case 4: return score_tile<T, 4, VECS>(rest, query_stride, keys, steps, scale, out);
    case 5: return score_tile<T, 5, VECS>(rest, query_stride, keys, steps, scale, out);
#endif
    default: return;
  }
}

// outputs[rows][4 vectors from d] = outputs * carry + probabilities x values
template <int ROWS, int VECS>
static void output_tile(const float* p, const float* values, int64_t count, int64_t padded, const float* carry, float* outputs) {
  V acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) acc[i][v] = mul(load(outputs + i * padded + v * 16), set1(carry[i]));
  for (int64_t k = 0; k < count; ++k) {
    V value[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) value[v] = load(values + k * padded + v * 16);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V weight = set1(p[i * kKeyTile + k]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[i][v] = fma(weight, value[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store(outputs + i * padded + v * 16, acc[i][v]);
}

template <int VECS>
static void output_rows(int64_t rows, const float* p, const float* values, int64_t count, int64_t padded, const float* carry, float* outputs) {
  int64_t i = 0;
  for (; i + kMaxAttentionRows <= rows; i += kMaxAttentionRows)
    output_tile<kMaxAttentionRows, VECS>(p + i * kKeyTile, values, count, padded, carry + i, outputs + i * padded);
#if defined(__AVX512F__)
  if (rows - i >= 3) {
    output_tile<3, VECS>(p + i * kKeyTile, values, count, padded, carry + i, outputs + i * padded);
    i += 3;
  }
#endif
  for (; i < rows; ++i) output_tile<1, VECS>(p + i * kKeyTile, values, count, padded, carry + i, outputs + i * padded);
}

struct RunningSoftmax {
  float largest;
  float carry;
  alignas(64) float sums[16];
};

constexpr float kNoScore = -1e30f;  // finite, so that differences of two of them are 0 and not NaN

// Fold the scores of keys [key0, key0 + 16 vecs) into the row's running softmax; scores become probabilities, 0 outside [lo, hi).
static void fold(RunningSoftmax& row, float* scores, int vecs, int64_t lo, int64_t hi) {
  V best = set1(kNoScore);
  for (int v = 0; v < vecs; ++v) best = max(best, keep(load(scores + v * 16), lo - v * 16, hi - v * 16, set1(kNoScore)));
  const float before = row.largest, found = largest(best), now = found > before ? found : before;
  alignas(64) float carry[16];
  store(carry, exp(set1(before - now)));
  row.carry = carry[0];
  row.largest = now;
  V sums = mul(load(row.sums), set1(row.carry));
  for (int v = 0; v < vecs; ++v) {
    const V p = keep(exp(sub(load(scores + v * 16), set1(now))), lo - v * 16, hi - v * 16, zero());
    store(scores + v * 16, p);
    sums = add(sums, p);
  }
  store(row.sums, sums);
}

template <class T>
static void attend(const Attention& a, const AttentionTask& task, const AttentionTask* next_task, const AttentionScratch& s) {
  const int64_t size = a.head_size, padded = round_up(size, 16), steps = (size + Step<T>::kSize - 1) / Step<T>::kSize;
  const int64_t query_stride = steps * Step<T>::kSize, tile_rows = task.rows * task.heads;
  T* queries = static_cast<T*>(s.queries);
  RunningSoftmax softmax[kQueryTile];
  float carry[kQueryTile];
  for (int64_t i = 0; i < tile_rows; ++i) {
    const int64_t row = task.first_row + i / task.heads, head = task.first_head + i % task.heads;
    __builtin_memcpy(queries + i * query_stride, static_cast<const T*>(a.q) + (row * a.heads + head) * size, static_cast<size_t>(size) * sizeof(T));
    if (query_stride > size) queries[i * query_stride + size] = T(0);
    softmax[i].largest = kNoScore;
    for (float& lane : softmax[i].sums) lane = 0.0f;
  }
  __builtin_memset(s.outputs, 0, static_cast<size_t>(tile_rows * padded) * 4);
  const int64_t end = task.first_position + task.rows;
  for (int64_t key0 = first_key(a, task); key0 < end; key0 += kKeyTile) {
    const int64_t count = end - key0 < kKeyTile ? end - key0 : kKeyTile;
    const int vecs = static_cast<int>((count + 15) / 16);
    const NextTile next = key0 + kKeyTile < end ? tile_at(&task, key0 + kKeyTile)
                          : next_task == nullptr ? NextTile{nullptr, 0, 0}
                                                 : tile_at(next_task, first_key(a, *next_task));
    transpose_keys<T>(a, task, key0, count, next, static_cast<uint32_t*>(s.keys));
    const T* keys = static_cast<const T*>(s.keys);
    if (vecs == 4) score_rows<T, 4>(tile_rows, queries, query_stride, keys, steps, a.scale, s.scores);
    else if (vecs == 3) score_rows<T, 3>(tile_rows, queries, query_stride, keys, steps, a.scale, s.scores);
    else if (vecs == 2) score_rows<T, 2>(tile_rows, queries, query_stride, keys, steps, a.scale, s.scores);
    else score_rows<T, 1>(tile_rows, queries, query_stride, keys, steps, a.scale, s.scores);
    for (int64_t i = 0; i < tile_rows; ++i) {
      const int64_t position = task.first_position + i / task.heads;
      const int64_t lo = a.window > 0 ? position - a.window + 1 - key0 : 0;
      fold(softmax[i], s.scores + i * kKeyTile, vecs, lo, position + 1 - key0);
      carry[i] = softmax[i].carry;
    }
    widen_values<T>(a, task, key0, count, padded, next, s.values);
    int64_t d = 0;
    for (; d + 64 <= padded; d += 64) output_rows<4>(tile_rows, s.scores, s.values + d, count, padded, carry, s.outputs + d);
    for (; d < padded; d += 16) output_rows<1>(tile_rows, s.scores, s.values + d, count, padded, carry, s.outputs + d);
  }
  for (int64_t i = 0; i < tile_rows; ++i) {
    const int64_t row = task.first_row + i / task.heads, head = task.first_head + i % task.heads;
    T* y = static_cast<T*>(a.y) + (row * a.heads + head) * size;
    const V scale = set1(1.0f / sum(load(softmax[i].sums)));
    for (int64_t d = 0; d < size; d += 16) store_n(y + d, size - d, mul(load(s.outputs + i * padded + d), scale));
  }
}

static AttentionScratch attention_scratch(const Attention& a) {
  const size_t wide = static_cast<size_t>(round_up(a.head_size, 16)) + 16;
  auto* bytes = static_cast<char*>(scratch(kTileScratch, (kQueryTile * 2 + kKeyTile * 2) * wide * 4 + kQueryTile * kKeyTile * 4));
  AttentionScratch s;
  s.queries = bytes;
  s.keys = bytes + kQueryTile * wide * 4;
  s.values = reinterpret_cast<float*>(static_cast<char*>(s.keys) + kKeyTile * wide * 4);
  s.outputs = s.values + kKeyTile * wide;
  s.scores = s.outputs + kQueryTile * wide;
  return s;
}

// Query rows of a sequence are cut into blocks of `rows_per_task`, the heads of a group into parts of at most kQueryTile.
static void attention(const Attention& a) {
  const int64_t per_group = a.heads / a.groups;
  const int64_t parts = (per_group + kQueryTile - 1) / kQueryTile, part = (per_group + parts - 1) / parts;
  const int64_t rows_per_task = kQueryTile / part > 0 ? kQueryTile / part : 1;
  auto* first_task = static_cast<int64_t*>(scratch(kPlanScratch, static_cast<size_t>(a.sequences + 1) * 8));
  first_task[0] = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t rows = a.query_start[s + 1] - a.query_start[s];
    first_task[s + 1] = first_task[s] + (rows + rows_per_task - 1) / rows_per_task * a.groups * parts;
  }
  auto task_at = [&](int64_t chunk) {
    int64_t lo = 0, hi = a.sequences;  // the last sequence with first_task[lo] <= chunk; it has rows, or its end would be <= chunk
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2;
      if (first_task[middle] <= chunk) lo = middle;
      else hi = middle;
    }
    const int64_t inside = chunk - first_task[lo], head_part = inside % (a.groups * parts);
    const int64_t begin = a.query_start[lo] + inside / (a.groups * parts) * rows_per_task, stop = a.query_start[lo + 1];
    AttentionTask task;
    task.group = head_part / parts;
    task.table = a.block_tables + lo * a.max_blocks;
    task.first_row = begin;
    task.rows = stop - begin < rows_per_task ? stop - begin : rows_per_task;
    task.first_position = a.context_lens[lo] - (stop - begin);
    task.first_head = task.group * per_group + head_part % parts * part;
    task.heads = (head_part % parts + 1) * part <= per_group ? part : per_group - head_part % parts * part;
    return task;
  };
  const int64_t tasks = first_task[a.sequences];
  auto body = [&](int64_t chunk) {
    const AttentionTask task = task_at(chunk);
    AttentionTask next;
    const bool has_next = chunk + a.threads < tasks;
    if (has_next) next = task_at(chunk + a.threads);
    const AttentionScratch s = attention_scratch(a);
    if (a.is_float) attend<float>(a, task, has_next ? &next : nullptr, s);
    else attend<bf16>(a, task, has_next ? &next : nullptr, s);
  };
  parallel(a.threads, tasks, body);
}
