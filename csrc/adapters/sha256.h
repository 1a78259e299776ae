// SHA-256 (FIPS 180-4) for tree hash v1: one message with the SHA extensions of x86, or 16 messages side by side in AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openlora {

constexpr int kDigestBytes = 32;
constexpr int kBlockBytes = 64;
constexpr int kLanes = 16;

// digest = SHA-256(prefix byte | data). `digest` [32] may not overlap `data`.
void sha256(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest);

// The same in plain C++, so that a test can hold the two against each other on one machine.
void sha256_portable(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest);

// Up to 16 messages that are read piece by piece. Words of one message lie a lane apart.
struct HashLanes {
  alignas(64) uint32_t words[8][kLanes];

  void start(int lane);
  // The next `count` blocks of lanes 0 .. lane_count - 1. Each pointer is moved on.
  void add(const uint8_t** blocks, int lane_count, size_t count);
  // The next `count` blocks of one lane.
  void add_one(int lane, const uint8_t* blocks, size_t count);
  // The last bytes of a message, fewer than a block, and its digest. message_bytes: of the whole message.
  void finish(int lane, const uint8_t* rest, size_t rest_bytes, uint64_t message_bytes, uint8_t* digest) const;
};

}  // namespace openlora
