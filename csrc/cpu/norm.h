// RMSNorm (with an optional residual add before it) and SiLU(gate) * up. A task is one row; a row is read and written once.
// Order: squares are added in 16 lanes, then reduced. Bound expected: latency of the call for a few rows, memory beyond.

constexpr int64_t kParallelElements = 32768;  // below this the fork costs more than the work

template <class T>
static void norm_row(const Norm& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.size;
  if (a.residual != nullptr) {
    T* residual = static_cast<T*>(a.residual) + row * a.size;
    for (int64_t i = 0; i < a.size; i += 16) store_n(residual + i, a.size - i, add(load_n(residual + i, a.size - i), load_n(x + i, a.size - i)));
    x = residual;
  }
  V squares = zero();
  for (int64_t i = 0; i < a.size; i += 16) {
    const V v = load_n(x + i, a.size - i);
    squares = fma(v, v, squares);
  }
  const V scale = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.size) + a.eps));
  const T* weight = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y) + row * a.size;
  for (int64_t i = 0; i < a.size; i += 16) {
    const int64_t n = a.size - i;
    store_n(y + i, n, mul(mul(load_n(x + i, n), scale), load_n(weight + i, n)));
  }
}

static void norm(const Norm& a) {
  auto body = [&](int64_t row) { a.is_float ? norm_row<float>(a, row) : norm_row<bf16>(a, row); };
  parallel_if(a.rows * a.size > kParallelElements, a.threads, a.rows, body);
}

template <class T>
static void silu_row(const SiluMul& a, int64_t row) {
  const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.size;
  const T* up = gate + a.size;
  T* y = static_cast<T*>(a.y) + row * a.size;
  for (int64_t i = 0; i < a.size; i += 16) {
    const int64_t n = a.size - i;
    const V g = load_n(gate + i, n);
    const V silu = div(g, add(set1(1.0f), exp(sub(zero(), g))));
    store_n(y + i, n, mul(silu, load_n(up + i, n)));
  }
}

static void silu_mul(const SiluMul& a) {
  auto body = [&](int64_t row) { a.is_float ? silu_row<float>(a, row) : silu_row<bf16>(a, row); };
  parallel_if(a.rows * a.size > kParallelElements / 4, a.threads, a.rows, body);
}
