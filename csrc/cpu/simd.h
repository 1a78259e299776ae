// Sixteen float lanes, whatever the instruction set: one register with AVX-512, two with AVX2.
// Included by each isa_*.cc inside its own namespace, so that no inline function compiled for one CPU is linked into another's path.
//
// V is 16 floats. P is 16 pairs of neighbouring bfloat16 (32 elements); `dot` adds the products of two P to a V, lane by lane.
// With avx512_bf16 that is one vdpbf16ps; elsewhere two fused multiply-adds on the even and the odd halves.

#define OL_INLINE static inline __attribute__((always_inline))

using bf16 = uint16_t;

OL_INLINE float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
OL_INLINE float to_float(float x) { return x; }

#if defined(__AVX512F__)

using V = __m512;
constexpr int kMaxTileRows = 8;       // accumulators of a linear tile: rows x 2 of 32 registers, 2 weights, 1 broadcast
constexpr int kMaxAttentionRows = 6;  // rows x 4 accumulators

OL_INLINE V zero() { return _mm512_setzero_ps(); }
OL_INLINE V set1(float x) { return _mm512_set1_ps(x); }
OL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
OL_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
OL_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
OL_INLINE V load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
OL_INLINE void store_n(float* p, int64_t n, V v) { _mm512_mask_storeu_ps(p, first(n), v); }
OL_INLINE V widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
OL_INLINE V load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
OL_INLINE V load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
OL_INLINE __m256i narrow(V v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}
OL_INLINE void store(bf16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
OL_INLINE void store_n(bf16* p, int64_t n, V v) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
OL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
OL_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
OL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
OL_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
OL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
OL_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
OL_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
OL_INLINE float sum(V v) { return _mm512_reduce_add_ps(v); }
OL_INLINE float largest(V v) { return _mm512_reduce_max_ps(v); }
// Lanes lo <= lane < hi of a, elsewhere b.
OL_INLINE V keep(V a, int64_t lo, int64_t hi, V b) {
  const unsigned below_hi = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : (1u << hi) - 1;
  const unsigned below_lo = lo >= 16 ? 0xffffu : lo <= 0 ? 0u : (1u << lo) - 1;
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(below_hi & ~below_lo), a);
}
OL_INLINE V round_nearest(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OL_INLINE V times_power_of_two(V v, V n) { return _mm512_scalef_ps(v, n); }

#if defined(__AVX512BF16__)
using P = __m512i;
OL_INLINE P load_pairs(const bf16* p) { return _mm512_loadu_si512(p); }
OL_INLINE P broadcast_pair(const bf16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm512_set1_epi32(static_cast<int>(pair));
}
OL_INLINE V dot(V acc, P a, P b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
struct P {
  V even, odd;
};
OL_INLINE P split(__m512i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)))};
}
OL_INLINE P load_pairs(const bf16* p) { return split(_mm512_loadu_si512(p)); }
OL_INLINE P broadcast_pair(const bf16* p) { return {set1(to_float(p[0])), set1(to_float(p[1]))}; }
OL_INLINE V dot(V acc, P a, P b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
#endif

// rows[i] holds 16 dwords of key i; afterwards out[j * stride + i] is dword j of key i.
OL_INLINE void transpose_16x16(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

#else  // AVX2

struct V {
  __m256 lo, hi;
};
constexpr int kMaxTileRows = 2;
constexpr int kMaxAttentionRows = 2;

OL_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
OL_INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OL_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OL_INLINE void store(float* p, V v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
OL_INLINE V load_n(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  alignas(32) float buffer[16] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * 4);
  return load(buffer);
}
OL_INLINE void store_n(float* p, int64_t n, V v) {
  if (n >= 16) return store(p, v);
  alignas(32) float buffer[16];
  store(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * 4);
}
OL_INLINE __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
OL_INLINE V load(const bf16* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
OL_INLINE V load_n(const bf16* p, int64_t n) {
  if (n >= 16) return load(p);
  alignas(32) bf16 buffer[16] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * 2);
  return load(buffer);
}
OL_INLINE __m256i rounded(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
}
OL_INLINE void store(bf16* p, V v) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(v.lo), rounded(v.hi)), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
OL_INLINE void store_n(bf16* p, int64_t n, V v) {
  if (n >= 16) return store(p, v);
  alignas(32) bf16 buffer[16];
  store(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * 2);
}
OL_INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
OL_INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
OL_INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
OL_INLINE V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
OL_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
OL_INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
OL_INLINE V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
OL_INLINE float sum(V v) {
  const __m256 eight = _mm256_add_ps(v.lo, v.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
OL_INLINE float largest(V v) {
  const __m256 eight = _mm256_max_ps(v.lo, v.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
OL_INLINE V keep(V a, int64_t lo, int64_t hi, V b) {
  alignas(32) float x[16], y[16];
  store(x, a);
  store(y, b);
  for (int64_t i = 0; i < 16; ++i) y[i] = i >= lo && i < hi ? x[i] : y[i];
  return load(y);
}
OL_INLINE V round_nearest(V v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.lo, kMode), _mm256_round_ps(v.hi, kMode)};
}
OL_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
OL_INLINE V times_power_of_two(V v, V n) { return mul(v, {power_of_two(n.lo), power_of_two(n.hi)}); }

struct P {
  V even, odd;
};
OL_INLINE P split(__m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))}};
}
OL_INLINE P load_pairs(const bf16* p) {
  return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
OL_INLINE P broadcast_pair(const bf16* p) { return {set1(to_float(p[0])), set1(to_float(p[1]))}; }
OL_INLINE V dot(V acc, P a, P b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }

OL_INLINE void transpose_16x16(const uint32_t* const* rows, uint32_t* out, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * stride + i] = rows[i][j];
}

#endif

// How each element type walks along the inputs: bfloat16 two at a time, float one at a time.
template <class T>
struct Step;
template <>
struct Step<bf16> {
  static constexpr int kSize = 2;
  using Vec = P;
  OL_INLINE Vec load_vec(const bf16* p) { return load_pairs(p); }
  OL_INLINE Vec broadcast(const bf16* p) { return broadcast_pair(p); }
  OL_INLINE V madd(V acc, Vec a, Vec b) { return dot(acc, a, b); }
};
template <>
struct Step<float> {
  static constexpr int kSize = 1;
  using Vec = V;
  OL_INLINE Vec load_vec(const float* p) { return load(p); }
  OL_INLINE Vec broadcast(const float* p) { return set1(*p); }
  OL_INLINE V madd(V acc, Vec a, Vec b) { return fma(a, b, acc); }
};

// e^x: Cody and Waite reduction, polynomial of degree 6; about 1 ulp on [-87, 88], clamped outside; exp(0) is exactly 1.
OL_INLINE V exp(V x) {
  x = min(max(x, set1(-87.0f)), set1(88.0f));
  const V n = round_nearest(mul(x, set1(1.44269504f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.3888889e-3f);
  p = fma(p, r, set1(8.3333333e-3f));
  p = fma(p, r, set1(4.1666667e-2f));
  p = fma(p, r, set1(1.6666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return times_power_of_two(p, n);
}

template <class F>
static void parallel(int threads, int64_t chunks, F& body) {
  run_parallel(threads, chunks, [](void* context, int64_t chunk) { (*static_cast<F*>(context))(chunk); }, &body);
}
template <class F>
static void parallel_if(bool is_worth_it, int threads, int64_t chunks, F& body) {
  if (is_worth_it) return parallel(threads, chunks, body);
  for (int64_t i = 0; i < chunks; ++i) body(i);
}
