// What the binding knows of the kernels: plain structs of raw pointers and one table of functions per instruction set.
//
// Shape letters: T rows (tokens), H inputs, O outputs, R page rank, S slots, G key/value heads, D head size, B block size.
// Elements are bfloat16 (as uint16_t bits) or float; `is_float` says which. All matrices are row-major and contiguous.
#pragma once

#include <cstdint>

namespace openlora {

constexpr int kPanel = 32;      // output columns of a packed weight panel: two vectors of 16 floats
constexpr int kSpanFields = 6;  // module index, A offset, B offset, inputs, outputs, first output column
constexpr int kIsaCount = 3;    // avx2, avx512, avx512bf16, in this order

// The adapters of a step (node/kernels/lora.py). `term_count` 0 means none.
struct Lora {
  const void* pages = nullptr;  // [P, page_elements]
  bool pages_are_float = false;
  int64_t page_elements = 0;
  int64_t page_rank = 1;
  const int32_t* slot_pages = nullptr;  // [S, max_pages]
  int64_t max_pages = 0;
  int64_t slot_count = 0;
  const int32_t* ranks = nullptr;      // [M, S]
  const float* scales = nullptr;       // [M, S]
  const int32_t* row_start = nullptr;  // [T + 1]
  const int32_t* slot = nullptr;       // [N]
  const float* weight = nullptr;       // [N]
  int64_t term_count = 0;              // N
  const int64_t* spans = nullptr;      // [span_count, kSpanFields]
  int64_t span_count = 0;
};

// y = x W^T + bias + adapters. `packed` null: y itself is the base and the adapters are added to it.
struct Linear {
  const void* x;       // [T, H]
  const void* packed;  // panels, see gemm.h
  const void* bias;    // [O] of x's type, or null
  void* y;             // [T, O]
  bool is_float;       // type of x, packed and bias
  bool out_is_float;
  int64_t rows, inputs, outputs;
  Lora lora;
  int threads;
};

struct Norm {
  const void* x;  // [T, H]
  void* residual;  // [T, H] or null; residual += x first
  const void* weight;
  void* y;
  bool is_float;
  int64_t rows, size;
  float eps;
  int threads;
};

struct SiluMul {
  const void* gate_up;  // [T, 2 I]
  void* y;              // [T, I]
  bool is_float;
  int64_t rows, size;  // T, I
  int threads;
};

struct RopeKv {
  const void* qkv;           // [T, (heads + 2 G) D]
  const float *cos, *sin;    // [positions, D / 2]
  const int64_t *positions, *kv_slots;  // [T]
  void *key_cache, *value_cache;        // [blocks, G, B, D]
  const void *q_norm, *k_norm;          // [D] or null
  void* q;                              // [T, heads D]
  bool is_float;
  int64_t rows, heads, groups, head_size, block_size;
  float eps;
  int threads;
};

struct Attention {
  const void* q;                        // [T, heads D]
  const void *key_cache, *value_cache;  // [blocks, G, B, D]
  const int32_t* block_tables;          // [Q, max_blocks]
  const int32_t *query_start, *context_lens;
  void* y;  // [T, heads D]
  bool is_float;
  int64_t sequences, max_blocks, heads, groups, head_size, block_size;
  int64_t window;  // 0: none
  float scale;
  int threads;
};

struct KernelTable {
  void (*linear)(const Linear&);
  void (*norm)(const Norm&);
  void (*silu_mul)(const SiluMul&);
  void (*rope_kv_write)(const RopeKv&);
  void (*attention)(const Attention&);
};

const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512bf16_kernels();

// The best table this CPU and operating system can run: 0, 1, 2, or -1 for none.
int best_isa();

}  // namespace openlora
