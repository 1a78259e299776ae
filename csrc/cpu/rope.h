// Split qkv, norm q and k per head where weights are given, rotate in halves, write k and v into the paged cache.
// A task is one row: it reads its qkv row and one row of each table, writes q and one slot of each cache.

template <class T>
static void rotate_head(const T* x, const float* cos, const float* sin, const T* weight, float eps, int64_t size, T* y) {
  const int64_t half = size / 2;
  V scale = set1(1.0f);
  if (weight != nullptr) {
    V squares = zero();
    for (int64_t i = 0; i < size; i += 16) {
      const V v = load_n(x + i, size - i);
      squares = fma(v, v, squares);
    }
    scale = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + eps));
  }
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i < 16 ? half - i : 16;
    V first = load_n(x + i, n), second = load_n(x + half + i, n);
    if (weight != nullptr) {
      first = mul(mul(first, scale), load_n(weight + i, n));
      second = mul(mul(second, scale), load_n(weight + half + i, n));
    }
    const V c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(y + i, n, sub(mul(first, c), mul(second, s)));
    store_n(y + half + i, n, add(mul(second, c), mul(first, s)));
  }
}

template <class T>
static void rope_row(const RopeKv& a, int64_t row) {
  const int64_t size = a.head_size;
  const T* x = static_cast<const T*>(a.qkv) + row * (a.heads + 2 * a.groups) * size;
  const float *cos = a.cos + a.positions[row] * (size / 2), *sin = a.sin + a.positions[row] * (size / 2);
  T* q = static_cast<T*>(a.q) + row * a.heads * size;
  for (int64_t h = 0; h < a.heads; ++h)
    rotate_head(x + h * size, cos, sin, static_cast<const T*>(a.q_norm), a.eps, size, q + h * size);
  const int64_t block = a.kv_slots[row] / a.block_size, offset = a.kv_slots[row] % a.block_size;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t place = ((block * a.groups + g) * a.block_size + offset) * size;
    rotate_head(x + (a.heads + g) * size, cos, sin, static_cast<const T*>(a.k_norm), a.eps, size, static_cast<T*>(a.key_cache) + place);
    __builtin_memcpy(static_cast<T*>(a.value_cache) + place, x + (a.heads + a.groups + g) * size, static_cast<size_t>(size) * sizeof(T));
  }
}

static void rope_kv_write(const RopeKv& a) {
  auto body = [&](int64_t row) { a.is_float ? rope_row<float>(a, row) : rope_row<bf16>(a, row); };
  parallel_if(a.rows * (a.heads + 2 * a.groups) * a.head_size > kParallelElements, a.threads, a.rows, body);
}
