#include "adapters/sha256.h"

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

namespace openlora {
namespace {

alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr uint32_t kInitial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

using Compress = void (*)(uint32_t* state, const uint8_t* blocks, size_t count);

uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

void compress_portable(uint32_t* state, const uint8_t* blocks, size_t count) {
  for (; count > 0; --count, blocks += kBlockBytes) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = static_cast<uint32_t>(blocks[4 * i]) << 24 | static_cast<uint32_t>(blocks[4 * i + 1]) << 16 |
             static_cast<uint32_t>(blocks[4 * i + 2]) << 8 | blocks[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; ++i) {
      const uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      const uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t sum[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += sum[i];
  }
}

// The instruction wants the state as (A, B, E, F) and (C, D, G, H), high word first. Measured on Zen 5: 1.8 GB/s against 0.3.
__attribute__((target("sha,sse4.1"))) void compress_extended(uint32_t* state, const uint8_t* blocks, size_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state)), 0xb1);
  const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4)), 0x1b);
  __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
  for (; count > 0; --count, blocks += kBlockBytes) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks) + i), big_endian);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m128i sum = _mm_add_epi32(w[i & 3], _mm_load_si128(reinterpret_cast<const __m128i*>(kRound) + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
      if (i < 12) {
        const __m128i seventh = _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4);
        w[i & 3] = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]), seventh), w[(i + 3) & 3]);
      }
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

// GCC 12 has no name for this feature in __builtin_cpu_supports.
bool has_sha_extensions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & (1u << 29)) != 0;
  return has_sha && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 19)) != 0;  // and SSE4.1
}

bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}

Compress best_compress() {
  static const Compress best = has_sha_extensions() ? compress_extended : compress_portable;
  return best;
}

#define OPENLORA_WIDE __attribute__((target("avx512f,avx512bw"))) inline

// rows[i] becomes column i: word w of lane l is rows[l][w] before and rows[w][l] after.
OPENLORA_WIDE void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88), high = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

OPENLORA_WIDE __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }

OPENLORA_WIDE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

// One block of 16 messages: about 1,700 instructions for 1 KiB, two a cycle.
__attribute__((target("avx512f,avx512bw"))) void compress_lanes(uint32_t (*words)[kLanes], const uint8_t** blocks, size_t count) {
  const __m512i big_endian = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL));
  __m512i s[8];
  for (int i = 0; i < 8; ++i) s[i] = _mm512_load_si512(words[i]);
  for (; count > 0; --count) {
    __m512i w[16];
    for (int lane = 0; lane < kLanes; ++lane) {
      w[lane] = _mm512_shuffle_epi8(_mm512_loadu_si512(blocks[lane]), big_endian);
      blocks[lane] += kBlockBytes;
    }
    transpose(w);
    __m512i a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
#pragma GCC unroll 64
    for (int i = 0; i < 64; ++i) {
      const __m512i s1 = xor3(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11), _mm512_ror_epi32(e, 25));
      const __m512i choice = _mm512_ternarylogic_epi32(e, f, g, 0xca);
      const __m512i known = add(h, add(w[i & 15], _mm512_set1_epi32(static_cast<int>(kRound[i]))));
      const __m512i t1 = add(known, add(s1, choice));
      const __m512i s0 = xor3(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13), _mm512_ror_epi32(a, 22));
      const __m512i majority = _mm512_ternarylogic_epi32(a, b, c, 0xe8);
      h = g, g = f, f = e, e = add(d, t1), d = c, c = b, b = a, a = add(t1, add(s0, majority));
      if (i < 48) {
        const __m512i x = w[(i + 1) & 15], y = w[(i + 14) & 15];
        const __m512i sigma0 = xor3(_mm512_ror_epi32(x, 7), _mm512_ror_epi32(x, 18), _mm512_srli_epi32(x, 3));
        const __m512i sigma1 = xor3(_mm512_ror_epi32(y, 17), _mm512_ror_epi32(y, 19), _mm512_srli_epi32(y, 10));
        w[i & 15] = add(add(w[i & 15], w[(i + 9) & 15]), add(sigma0, sigma1));
      }
    }
    const __m512i sum[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) s[i] = add(s[i], sum[i]);
  }
  for (int i = 0; i < 8; ++i) _mm512_store_si512(words[i], s[i]);
}

// The end of a message: its last bytes, padding and length.
void close(Compress compress, uint32_t* state, const uint8_t* rest, size_t rest_bytes, uint64_t message_bytes, uint8_t* digest) {
  uint8_t block[2 * kBlockBytes] = {};
  if (rest_bytes > 0) memcpy(block, rest, rest_bytes);
  block[rest_bytes] = 0x80;
  const size_t padded = rest_bytes + 9 <= kBlockBytes ? kBlockBytes : 2 * kBlockBytes;
  for (int i = 0; i < 8; ++i) block[padded - 1 - i] = static_cast<uint8_t>((8 * message_bytes) >> (8 * i));
  compress(state, block, padded / kBlockBytes);
  for (int i = 0; i < 32; ++i) digest[i] = static_cast<uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
}

void digest_with(Compress compress, uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest) {
  uint32_t state[8];
  memcpy(state, kInitial, sizeof state);
  uint8_t block[kBlockBytes] = {prefix};
  const size_t head = size_bytes < kBlockBytes - 1 ? size_bytes : kBlockBytes - 1;
  if (head > 0) memcpy(block + 1, data, head);
  if (head < kBlockBytes - 1) {
    close(compress, state, block, head + 1, size_bytes + 1, digest);
    return;
  }
  compress(state, block, 1);
  const size_t whole = (size_bytes - head) / kBlockBytes, done = head + whole * kBlockBytes;
  if (whole > 0) compress(state, data + head, whole);
  close(compress, state, data + done, size_bytes - done, size_bytes + 1, digest);
}

}  // namespace

void sha256(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest) {
  digest_with(best_compress(), prefix, data, size_bytes, digest);
}

void sha256_portable(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest) {
  digest_with(compress_portable, prefix, data, size_bytes, digest);
}

void HashLanes::start(int lane) {
  for (int i = 0; i < 8; ++i) words[i][lane] = kInitial[i];
}

void HashLanes::add(const uint8_t** blocks, int lane_count, size_t count) {
  static const bool is_wide = has_avx512();
  constexpr int kWorthIt = 5;  // 16 lanes cost as much as four or five messages one by one
  if (is_wide && lane_count >= kWorthIt) {
    const uint8_t* all[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) all[lane] = blocks[lane < lane_count ? lane : 0];
    compress_lanes(words, all, count);
    for (int lane = 0; lane < lane_count; ++lane) blocks[lane] = all[lane];
    return;
  }
  for (int lane = 0; lane < lane_count; ++lane) {
    add_one(lane, blocks[lane], count);
    blocks[lane] += count * kBlockBytes;
  }
}

void HashLanes::add_one(int lane, const uint8_t* blocks, size_t count) {
  uint32_t state[8];
  for (int i = 0; i < 8; ++i) state[i] = words[i][lane];
  best_compress()(state, blocks, count);
  for (int i = 0; i < 8; ++i) words[i][lane] = state[i];
}

void HashLanes::finish(int lane, const uint8_t* rest, size_t rest_bytes, uint64_t message_bytes, uint8_t* digest) const {
  uint32_t state[8];
  for (int i = 0; i < 8; ++i) state[i] = words[i][lane];
  close(best_compress(), state, rest, rest_bytes, message_bytes, digest);
}

}  // namespace openlora
