// From a verified file into adapter pages and its content hash, in one pass over the bytes. Plain C: called through ctypes, which
// releases the interpreter lock for the whole call, so that neither the step loop nor anything else in the process waits for it.
#pragma once

#include <cstdint>

extern "C" {

// One tensor of a file. Python builds these as numpy records; keep `node/adapters/file_plan.py` equal.
struct OpenloraTensor {
  int64_t file_offset;      // bytes
  int64_t rows;             // 1 where the tensor is no matrix
  int64_t columns;
  int64_t first_placement;  // its placements lie side by side; a tensor without any is only hashed
  int32_t placement_count;
  int32_t dtype;  // 0 float32, 1 float16, 2 bfloat16
};

// Rows first_row .. first_row + row_count - 1 of a tensor become one matrix of the pages. A is [rank, in] in both; B is [out, rank] in
// the file and [rank, out] in the pages.
struct OpenloraPlacement {
  int64_t page_offset;  // elements, of the matrix inside each page
  int64_t first_row;
  int64_t row_count;
  int64_t is_transposed;
};

struct OpenloraPages {
  void* const* pages;  // page_count pointers to page_elements each
  int64_t page_count;
  int64_t page_elements;
  int64_t page_rank;
  int32_t dtype;  // 0 float32, 2 bfloat16
};

// Threads and their buffers, for any number of reads, one at a time, each on at most as many threads as it says. Returns null when there
// is no memory.
__attribute__((visibility("default"))) void* openlora_reader_open(int thread_count);
__attribute__((visibility("default"))) void openlora_reader_close(void* reader);

// Reads all tensors into the pages and writes the tree hash v1 of each one's bytes to roots [tensor_count, 32].
// Returns 0; an errno; -1: the file ended early; -2: a tensor does not fit into the pages. Pages are then half written.
__attribute__((visibility("default"))) int openlora_read_adapter(void* reader, int thread_count, int descriptor,
                                                                 const OpenloraTensor* tensors, int64_t tensor_count,
                                                                 const OpenloraPlacement* placements, int64_t placement_count,
                                                                 const OpenloraPages* pages, uint8_t* roots);

// The same in two calls, so that somebody may go on with the pages before their hash is known. The first keeps the bytes it reads; the
// second hashes those, of the same tensors, and nobody reads anything else with this reader in between. The first also returns ENOMEM.
__attribute__((visibility("default"))) int openlora_place_adapter(void* reader, int thread_count, int descriptor,
                                                                  const OpenloraTensor* tensors, int64_t tensor_count,
                                                                  const OpenloraPlacement* placements, int64_t placement_count,
                                                                  const OpenloraPages* pages);
__attribute__((visibility("default"))) int openlora_hash_placed(void* reader, int thread_count, const OpenloraTensor* tensors,
                                                                int64_t tensor_count, uint8_t* roots);

// digest [32] = SHA-256(prefix | data), for the tests. is_portable: without the processor's extensions.
__attribute__((visibility("default"))) void openlora_sha256(uint8_t prefix, const uint8_t* data, int64_t size_bytes, int is_portable,
                                                            uint8_t* digest);
}
