// Paged decode attention, bfloat16: one row a sequence, the query heads of a key/value head together.
// The cuts of the keys ("items") are made on the device once a step, by node/kernels/attention/triton_decode.py.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "lora_work.h"

namespace openlora {

constexpr int kAttentionItemInts = 32;
constexpr int kAttentionItemHeader = 8;

struct AttentionDecodeArgs {
  const void* q;       // [rows, heads, head_dim] bfloat16; rows q_stride elements apart
  const void* keys;    // [blocks, block_size, groups, head_dim] bfloat16
  const void* values;  // the same, same strides
  void* out;           // [rows, heads, head_dim] bfloat16; rows with context 0 get 0
  const int32_t* tables;  // [sequences, table_stride]
  // [at least `workers`, 32]: sequence, first key, key after the last, place of its partial result, items of the sequence, place of
  // its first partial result (they lie one after another), length of the sequence, its row, the item's first 24 cache blocks. An item of
  // several rows, the last of which is the last key's: sequence, first key, key after the last, 0, -rows, 0, keys older than the step,
  // first row, and its blocks.
  const int32_t* items;
  const int32_t* counts;  // [1 + sequences]: items in all, then of each sequence
  float* partial;         // [items, heads, head_dim]
  float* stats;           // [items, heads, 2]: largest score (log2 units), sum of weights
  int32_t* done;          // [sequences, groups]: 0 before and after
  int64_t block_stride, token_stride;  // elements
  int32_t q_stride, out_stride, table_stride;
  int32_t sequences, groups, heads_per_group, head_dim;
  int32_t block_size;  // a power of two, at least 16
  int32_t block_bits;  // its logarithm; the launcher sets it
  int32_t window;      // keys that a row of a chunk sees, itself included; 0: all
  int32_t workers;     // blocks of threads for each group; any number is right
  float scale_log2;    // scale of the scores x log2(e)
  Follow follow;       // kWaitFirst: keys and values of earlier steps are fetched before the kernel before this one has ended.
                       // What `items`, `counts` and `tables` hold must be older than the kernel before.
};

// Whether head_dim (64 or 128), heads_per_group (1 to 16) and block_size are among the compiled ones.
bool can_attend_decode(int32_t head_dim, int32_t heads_per_group, int32_t block_size);

// Whether a variant takes items of several rows; then q and out have a row for each row of the step, and rows without item are left alone.
bool has_attention_chunks(int64_t variant);

// Launch on `stream`. Returns the launch's error. `variant`: 0 has 3 warps a block (four blocks an SM), 1 has 6 (two), 2 has 8 (one, and
// 192 KiB of shared memory); 3 has 4 warps (three blocks) and takes items of several rows.
cudaError_t launch_attention_decode(const AttentionDecodeArgs& args, int variant, cudaStream_t stream);

}  // namespace openlora
