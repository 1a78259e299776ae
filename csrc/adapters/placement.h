// Where a leaf of a LoRA matrix goes inside adapter pages (`node/kernels/layout.py`): conversion, then rows or a transposition.
#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

namespace openlora {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline int64_t item_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // subnormal: mantissa x 2^-24, exact
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign != 0 ? -value : value;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Ties to even, as torch rounds.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` elements of `source` into `target`; the page's dtype is float32 or bfloat16, and never the source's.
inline void convert(const uint8_t* source, Dtype dtype, uint8_t* target, Dtype page_dtype, int64_t count) {
  auto* wide = reinterpret_cast<float*>(target);
  auto* narrow = reinterpret_cast<uint16_t*>(target);
  const auto* floats = reinterpret_cast<const float*>(source);
  const auto* halves = reinterpret_cast<const uint16_t*>(source);
  if (page_dtype == Dtype::kBfloat16) {
    if (dtype == Dtype::kFloat32) {
      for (int64_t i = 0; i < count; ++i) narrow[i] = to_bfloat16(floats[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) narrow[i] = to_bfloat16(half_to_float(halves[i]));
    }
  } else if (dtype == Dtype::kFloat16) {
    for (int64_t i = 0; i < count; ++i) wide[i] = half_to_float(halves[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) wide[i] = bits_to_float(static_cast<uint32_t>(halves[i]) << 16);
  }
}

// Rows of 8 elements become columns: source rows `source_stride` apart, target rows `target_stride` apart, in elements.
inline void transpose_tile(const uint16_t* source, int64_t source_stride, uint16_t* target, int64_t target_stride) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * source_stride));
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm_unpacklo_epi32(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm_unpackhi_epi32(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm_unpacklo_epi32(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm_unpackhi_epi32(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 2 * i * target_stride), _mm_unpacklo_epi64(a[i], a[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + (2 * i + 1) * target_stride), _mm_unpackhi_epi64(a[i], a[i + 4]));
  }
}

inline void transpose_tile(const uint32_t* source, int64_t source_stride, uint32_t* target, int64_t target_stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) target[j * target_stride + i] = source[i * source_stride + j];
  }
}

// Whole cache lines past the caches: the pages are read next by the GPU, and a line that is only written need not be fetched first.
// `fence` orders them before whatever tells others that the pages are complete.
constexpr int64_t kLineBytes = 64;

inline bool is_line(const void* address) { return reinterpret_cast<uintptr_t>(address) % kLineBytes == 0; }

inline void stream_lines(void* target, const void* source, int64_t size_bytes) {
  auto* to = static_cast<__m128i*>(target);
  const auto* from = static_cast<const __m128i*>(source);
  for (int64_t i = 0; i < size_bytes / 16; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
}

inline void stream_copy(void* target, const void* source, int64_t size_bytes) {
  const int64_t lines = is_line(target) ? size_bytes / kLineBytes * kLineBytes : 0;
  stream_lines(target, source, lines);
  memcpy(static_cast<uint8_t*>(target) + lines, static_cast<const uint8_t*>(source) + lines, size_bytes - lines);
}

inline void fence() { _mm_sfence(); }

// Where (a part of) a matrix goes inside each of the adapter's pages.
struct Target {
  int64_t width;        // values of a rank: in_features for A, the number of B's rows that are meant
  int64_t page_offset;  // elements
  int64_t page_rank;
  void* const* pages;

  template <class T>
  T* rank_row(int64_t rank) const {
    return static_cast<T*>(pages[rank / page_rank]) + page_offset + rank % page_rank * width;
  }
};

// Elements begin .. begin + count - 1 of a matrix [ranks, width].
template <class T>
void place_rows(const Target& target, const T* values, int64_t begin, int64_t count) {
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t column = begin % target.width;
    const int64_t run = target.width - column < end - begin ? target.width - column : end - begin;
    stream_copy(target.rank_row<T>(begin / target.width) + column, values, run * sizeof(T));
    begin += run, values += run;
  }
}

// `rows` rows of eight ranks: tiles of 8 by 8, and where lines allow it several tiles at once, so that each rank gets a whole line.
template <class T>
void place_tiles(const T* source, int64_t ranks, T* target, int64_t width, int64_t rows) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  int64_t row = 0;
  if (is_line(target) && width % kLine == 0) {
    alignas(kLineBytes) T lines[8 * kLine];
    for (; row + kLine <= rows; row += kLine) {
      for (int64_t i = 0; i < kLine; i += 8) transpose_tile(source + (row + i) * ranks, ranks, lines + i, kLine);
      for (int rank = 0; rank < 8; ++rank) stream_lines(target + rank * width + row, lines + rank * kLine, kLineBytes);
    }
  }
  for (; row < rows; row += 8) transpose_tile(source + row * ranks, ranks, target + row, width);
}

// Elements begin .. begin + count - 1 of a matrix [width, ranks]. Whole rows go in tiles where eight ranks lie in one page; what is left
// goes one by one.
template <class T>
void place_columns(const Target& target, int64_t ranks, const T* values, int64_t begin, int64_t count) {
  const int64_t end = begin + count;
  const auto single = [&](int64_t e) { target.rank_row<T>(e % ranks)[e / ranks] = values[e - begin]; };
  int64_t e = begin;
  for (; e < end && e % ranks != 0; ++e) single(e);
  const int64_t first = e / ranks;
  const int64_t tiled_rows = (end - e) / ranks / 8 * 8;
  const int64_t tiled_ranks = target.page_rank % 8 == 0 ? ranks / 8 * 8 : 0;
  for (int64_t rank = 0; rank < tiled_ranks; rank += 8) {
    place_tiles(values + (e - begin) + rank, ranks, target.rank_row<T>(rank) + first, target.width, tiled_rows);
  }
  for (int64_t row = first; row < first + tiled_rows && tiled_ranks < ranks; ++row) {
    for (int64_t rank = tiled_ranks; rank < ranks; ++rank) single(row * ranks + rank);
  }
  for (e += tiled_rows * ranks; e < end; ++e) single(e);
}

}  // namespace openlora
