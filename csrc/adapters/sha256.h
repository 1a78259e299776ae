// SHA-256 (FIPS 180-4) for tree hash v1, with the SHA extensions of x86 where the processor has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace openlora {

constexpr int kDigestBytes = 32;

// digest = SHA-256(prefix byte | data). `digest` [32] may not overlap `data`.
void sha256(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest);

// The same in plain C++, so that a test can hold the two against each other on one machine.
void sha256_portable(uint8_t prefix, const uint8_t* data, size_t size_bytes, uint8_t* digest);

}  // namespace openlora
